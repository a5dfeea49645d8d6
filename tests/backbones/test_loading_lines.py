"""Lines that load a file, run as they are."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.backbones.exporting import export_hub, export_state, library_state
from bdclean.backbones.loading_lines import loading_lines
from bdclean.weights import write_torch

HALF = (0.5, 0.5, 0.5)
IMAGES = torch.rand(2, 3, 32, 32)


class Mine(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(width, 7)
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _model(arch, classes=7, width=64):
    torch.manual_seed(0)
    return build(ModelInfo(arch, classes, 32, HALF, HALF, width)).eval()


def _answer(path, info):
    """What the loaded network or model says, and the lines."""
    lines, place = loading_lines(path, info), {}
    exec(lines, place)  # noqa: S102
    with torch.no_grad():
        if "network" in place:
            return place["network"].eval()((IMAGES - 0.5) / 0.5), lines
        return place["model"](IMAGES), lines


@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors", "ours.safetensors", "folder"])
def test_a_network_of_ones_own_is_named(name):
    """By its constructor, or to `load_model`, which imports no module that a file names."""
    model = _model(f"{__name__}:Mine(width=5)@fc")
    if name == "folder":
        export_hub(model, name)
    elif name.startswith("ours"):
        save_model(model, name)
    else:
        export_state(model, name)
    answer, lines = _answer(name, model.info)
    with torch.no_grad():
        assert torch.equal(answer, model(IMAGES))
    made = f"from {__name__} import Mine\nnetwork = Mine(width=5)\n"
    assert (made in lines) == name.startswith("plain")
    assert (f"arch={model.info.arch!r}" in lines) == (not name.startswith("plain"))


@pytest.mark.parametrize("arch", [f"{__name__}:Mine", "resnet18", "preact_resnet18"])
def test_where_no_constructor_fits_load_model_is_told_all(arch):
    model = _model(arch, classes=3, width=4 if ":" not in arch else 64)
    export_state(model, "plain.pth")
    answer, lines = _answer("plain.pth", model.info)
    assert f"load_model('plain.pth', arch={model.info.arch!r}, input_size=32, mean=" in lines
    with torch.no_grad():
        assert torch.equal(answer, model(IMAGES))


def test_keys_around_the_network_are_followed():
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    torch.save({"nets": {"best": network.state_dict()}, "epoch": 3}, "x.pth")
    model = load_model("x.pth", arch="shufflenet_v2_x0_5", input_size=32, mean=HALF, std=HALF)
    answer, lines = _answer("x.pth", model.info)
    assert "torch.load('x.pth', weights_only=True)['nets']['best']" in lines
    with torch.no_grad():
        assert torch.allclose(answer, model.eval()(IMAGES), atol=1e-5)


def test_a_missing_classifier_is_allowed_and_no_more():
    model = _model("torchvision:shufflenet_v2_x0_5", classes=None)
    state = library_state(model)
    write_torch(state, "x.pth")
    lines = _answer("x.pth", model.info)[1]
    assert "network = shufflenet_v2_x0_5()\n" in lines
    assert lines.endswith(", strict=False)\nnetwork.eval()")
    del state["conv1.0.weight"]
    write_torch(state, "x.pth")
    assert "load_model" in loading_lines("x.pth", model.info)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_classifiers_in_the_middle_are_made_where_the_file_has_them(auxiliary):
    with torch.device("meta"):
        network = torchvision.models.googlenet(
            num_classes=3, aux_logits=auxiliary, init_weights=False
        )
    write_torch({k: torch.zeros(v.shape) for k, v in network.state_dict().items()}, "x.pth")
    info = ModelInfo("torchvision:googlenet", 3, 224, HALF, HALF)
    call = "googlenet(num_classes=3)" if auxiliary else "googlenet(num_classes=3, aux_logits=False)"
    assert f"network = {call}\n" in loading_lines("x.pth", info)


def test_what_nobody_can_make_is_left_to_the_reader():
    model = _model(f"{__name__}:Mine")
    export_state(model, "x.pth")
    lines = loading_lines("x.pth", replace(model.info, arch="live:Mine"))
    assert "# network: an object of the class that the file was made for" in lines
    place = {"network": Mine()}
    exec(lines, place)  # noqa: S102
    assert torch.equal(place["network"].fc.weight, model.head.weight)
