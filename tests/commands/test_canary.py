"""A backdoor of ours in a copy: that it is learned, and that its success is counted right."""

import pytest
import torch

from bdclean.backbones import ModelInfo, build
from bdclean.commands import canary
from bdclean.commands.canary import UNLEARNED, Canary, canary_lines, check_canary, run_canary
from bdclean.errors import ConfigError


@pytest.fixture
def suspect():
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", 3, 16, (0.5,) * 3, (0.25,) * 3, width=4)).train()
    with torch.no_grad():
        for _ in range(20):  # running statistics, as a trained network has them
            model(torch.rand(64, 3, 16, 16))
    return model.eval()


def test_the_copy_learns_what_the_suspect_does_not_know(suspect, monkeypatch):
    monkeypatch.setattr(canary, "EPOCHS", 16)  # for a network that knows nothing
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (320, 3, 16, 16), dtype=torch.uint8, generator=generator)
    before = {key: value.clone() for key, value in suspect.state_dict().items()}
    asked = []

    def undo(copy):
        asked.append(copy)
        return suspect.copy()

    found = run_canary(suspect, pixels, undo)
    assert all(torch.equal(value, before[key]) for key, value in suspect.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in asked[0].state_dict().items())
    patch, blended = found
    assert patch.images <= 64
    assert patch.trigger == "white patch of 3 pixels"
    assert min(patch.before, blended.before) > 90
    assert max(patch.after, blended.after) < 60


def test_nothing_is_measured_where_all_images_are_of_the_class_of_a_trigger(suspect, monkeypatch):
    monkeypatch.setattr(canary, "EPOCHS", 1)
    with torch.no_grad():
        suspect.head.bias[0] += 100
    pixels = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    patch, blended = run_canary(suspect, pixels, lambda copy: copy)
    assert (patch.before, patch.after, patch.images) == (None, None, 0)
    assert blended.images == 12
    assert blended.before is not None
    told = canary_lines([patch, blended])
    assert told[0] == (
        "Canary, white patch of 3 pixels: nothing was measured, because the suspect names all 12 "
        "images that were held out class 0, to which this trigger leads."
    )
    assert told[1] == (
        f"Canary, blended pattern: ASR {blended.before:.1f} % before, {blended.before:.1f} % after "
        f"(planted by us in a copy). {UNLEARNED}"
    )
    assert UNLEARNED not in canary_lines([Canary("patch", 99.0, 3.0, 12)])[0]
    assert blended.details == f"12 images. {UNLEARNED}"


def test_what_cannot_be_measured_is_told(suspect):
    with pytest.raises(ConfigError, match="CBD leaves no head"):
        check_canary(suspect, 400, "cbd")
    with pytest.raises(ConfigError, match="50 images or more"):
        check_canary(suspect, 49, "bcu")
    suspect.replace_head(None)
    with pytest.raises(ConfigError, match="2 classes or more"):
        check_canary(suspect, 400, "bcu")
