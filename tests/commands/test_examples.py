"""Pictures of images whose answers change: what is shown of a row can be compared."""

import pytest
import torch

from bdclean.backbones import ModelInfo, build
from bdclean.commands import examples
from bdclean.commands.examples import most_flipped


@pytest.mark.parametrize("each", [2, 3])
def test_the_differences_of_a_row_have_one_scale(each, monkeypatch):
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", 3, 8, (0.5,) * 3, (0.25,) * 3, width=4)).eval()
    images = torch.full((4, 3, 8, 8), 0.5)
    sizes = torch.tensor([0.02, 0.04, 0.06, 0.08]).view(4, 1, 1, 1)
    monkeypatch.setattr(examples, "perturbed", lambda x, *_: x + sizes)
    found = most_flipped(model, model.copy().eval(), images, each)
    assert [example.family for example in found] == ["patch"] * each + ["universal 8"] * each
    for row in found[:each], found[each:]:
        (scale,) = {example.amplified for example in row}
        apart = [float(e.moved.int().sub(e.clean.int()).float().mean()) for e in row]
        assert scale == int(1 / (max(apart) / 255) + 0.2)
        assert len({round(value) for value in apart}) == each
        for value, example in zip(apart, row, strict=True):
            assert example.difference.float().mean() == pytest.approx(value * scale, abs=scale)
            assert example.difference.max() <= 255
