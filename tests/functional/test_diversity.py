import pytest
import torch

from bdclean.functional.diversity import diversity


@pytest.mark.parametrize("channels", [3, 1], ids=["patterns", "masks"])
def test_diversity_is_the_formula(channels):
    x1, x2, p1, p2 = torch.rand(4, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    p1, p2 = p1[:, :channels], p2[:, :channels]
    wanted = 0.0
    for i in range(5):
        images = ((x1[i] - x2[i]) ** 2).mean() ** 0.5
        patterns = ((p1[i] - p2[i]) ** 2).mean() ** 0.5
        wanted += images / (patterns + 1e-7) / 5
    torch.testing.assert_close(diversity(x1, x2, p1, p2), wanted)


def test_equal_masks_have_a_finite_gradient():
    images = torch.rand(2, 3, 3, 4, 4)
    mask = torch.ones(3, 1, 4, 4, requires_grad=True)
    diversity(*images, mask, mask.detach()).backward()
    assert mask.grad.isfinite().all()
