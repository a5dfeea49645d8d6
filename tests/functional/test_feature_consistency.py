import pytest
import torch
import torchvision.transforms.functional as tv
from torch.nn import functional as F

from bdclean.functional.feature_consistency import (
    draw_transforms,
    feature_consistency,
    intra_class_loss,
    rotate_and_shift,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_consistency_is_the_mean_squared_difference():
    a, b = torch.randn(5, 7, generator=generator(1)), torch.randn(5, 7, generator=generator(2))
    expected = [
        sum((x - y) ** 2 for x, y in zip(*pair, strict=True)) / 7 for pair in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(feature_consistency(a, b), torch.stack(expected))
    assert feature_consistency(a, a).tolist() == [0] * 5


def literal_loss(features, labels):
    """Means of the classes present, scaled; Gram matrix without diagonal; mean of all entries."""
    centers = [features[labels == c].mean(0) for c in labels.unique()]
    total = torch.zeros(())
    for i, a in enumerate(centers):
        for j, b in enumerate(centers):
            if i != j:
                total = total + F.cosine_similarity(a, b, dim=0)
    return total / len(centers) ** 2


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [1, 3], [2]])
def test_intra_class_loss_and_its_gradient_are_the_literal_ones(classes):
    features = torch.rand(12, 6, generator=generator(), requires_grad=True)
    labels = torch.tensor(classes)[torch.arange(12) % len(classes)]
    wanted, loss = literal_loss(features, labels), intra_class_loss(features, labels, 5)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    (got,) = torch.autograd.grad(loss, features)
    assert got.isfinite().all()
    if len(classes) > 1:
        (expected,) = torch.autograd.grad(wanted, features)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert got.abs().sum() > 0
    else:
        assert got.abs().sum() == 0


def test_intra_class_loss_of_equal_and_of_orthogonal_means():
    labels = torch.tensor([0, 0, 1, 1])
    same = torch.ones(4, 3)
    assert intra_class_loss(same, labels, 2).item() == pytest.approx(0.5)  # 2 ones in 4 entries
    apart = torch.tensor([[1.0, 0], [3.0, 0], [0, 2.0], [0, 1.0]])
    assert intra_class_loss(apart, labels, 2).item() == 0


def test_intra_class_loss_stays_in_float32_under_autocast():
    features, labels = torch.rand(8, 4, generator=generator()), torch.arange(8) % 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = intra_class_loss(features, labels, 3)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, intra_class_loss(features, labels, 3))


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_rotation_then_shift_equals_torchvision(size):
    count = 40
    images = torch.rand(count, 3, *size, generator=generator(3)) + 0.1
    angles = torch.empty(count).uniform_(-180, 180, generator=generator(4))
    angles[:3] = torch.tensor([0.0, 90.0, -180.0]) if size[0] == size[1] else 0.0
    shifts = torch.randint(-2, 3, (count, 2), generator=generator(5))
    shifts[0] = 0
    expected = []
    for image, angle, (down, right) in zip(images, angles.tolist(), shifts.tolist(), strict=True):
        turned = tv.rotate(image, angle)
        expected.append(tv.affine(turned, 0.0, [right, down], 1.0, [0.0, 0.0]))
    got = rotate_and_shift(images, angles, shifts)
    assert torch.equal(got[0], images[0])
    # a pixel may lie on the border between two, up to float32 rounding
    assert (got != torch.stack(expected)).any(1).float().mean().item() < 1e-3


def test_draws_cover_their_ranges_and_depend_on_the_generator_alone():
    angles, shifts = draw_transforms(20000, 32, 180.0, 0.2, generator())
    assert angles.min() == pytest.approx(-180, abs=0.2)
    assert angles.max() == pytest.approx(180, abs=0.2)
    assert angles.mean().item() == pytest.approx(0, abs=3)
    # U(-6.4, 6.4), rounded: the outermost pixels have 0.9 of the share of the others
    counts = torch.bincount((shifts + 6).flatten(), minlength=13).float() / shifts.numel()
    assert len(counts) == 13
    assert counts[1:-1].sub(1 / 12.8).abs().max() < 0.005
    assert counts[[0, -1]].sub(0.9 / 12.8).abs().max() < 0.005
    assert not torch.equal(shifts[:, 0], shifts[:, 1])
    torch.rand(3)
    again = draw_transforms(20000, 32, 180.0, 0.2, generator())
    assert torch.equal(again[0], angles)
    assert torch.equal(again[1], shifts)
    still, unmoved = draw_transforms(4, 32, 0.0, 0.0, generator())
    assert not still.any()
    assert not unmoved.any()
