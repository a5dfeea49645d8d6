"""`bdclean.purify` and `bdclean.check` from Python."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bdclean
from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = {
    "model.recipe.epochs": 1,
    "model.ball.steps": 1,
    "model.patch.steps": 1,
    "model.universal.steps": 1,
    "trainer.precision": "32-true",
}
FACTS = {"input_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.answer = nn.Linear(4, 6)

    def forward(self, x):
        return self.answer(self.stem(x).mean((2, 3)))


@pytest.fixture
def place(tmp_path, monkeypatch, quick_tests):
    """130 photos of 8 pixels in a folder, and the same in memory."""
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (130, 8, 8, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / "photos" / f"{number:03}.png")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def test_a_file_is_cleaned_with_a_folder_and_with_the_same_images_in_memory(place, capsys):
    model = build(ModelInfo("resnet18", 6, 8, (0.5,) * 3, (0.25,) * 3, width=4))
    save_model(model, "suspect.safetensors")
    by_folder = bdclean.purify("suspect.safetensors", "photos", run="runs/here", settings=SETTINGS)
    assert by_folder.weights.name == "model.safetensors"
    assert load_model(by_folder.weights).info == model.info
    assert [each.test for each in by_folder.before] == [each.test for each in by_folder.after]
    assert 0 <= by_folder.agreement <= 1
    assert by_folder.record["protocol"]["finished"]
    by_tensor = bdclean.purify("suspect.safetensors", place.float() / 255, settings=SETTINGS)
    assert by_tensor.run is None
    assert by_tensor.weights is None
    for key, value in by_folder.model.state_dict().items():
        assert torch.equal(by_tensor.model.state_dict()[key], value)
    assert by_tensor.model(place[:2].float() / 255).shape == (2, 6)
    assert capsys.readouterr().out == ""


def test_a_network_in_memory_is_cleaned_and_stays_as_it_was(place, tmp_path):
    network = Own().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random.seed(0)
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    result = bdclean.purify(network, place, out="clean.pth", **FACTS, settings=SETTINGS)
    assert random.getstate() == drawn[0]
    assert np.random.get_state()[1].tolist() == drawn[1]
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert isinstance(result.model, Own)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert any(not torch.equal(result.model.state_dict()[k], v) for k, v in before.items())
    fresh = Own()
    fresh.load_state_dict(torch.load(result.out, weights_only=True))
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in fresh.state_dict().items())
    kept = bdclean.purify(network, "photos", run="runs/own", **FACTS, settings=SETTINGS)
    assert (tmp_path / "runs/own/purified.safetensors").is_file()
    for key, value in kept.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[key])
    with pytest.raises(ConfigError, match="it exists already"):
        bdclean.purify(network, "photos", run="runs/own", **FACTS, settings=SETTINGS)


def test_check_gives_the_verdicts_of_the_command(place):
    by_tensor = bdclean.check(Own(), place, **FACTS)
    assert [each.test for each in by_tensor] == [
        *("ball", "patch", "universal 4", "universal 8", "DECREE", "MM-BD"),
    ]
    without = bdclean.check(Own(), **FACTS)
    assert [each.state == "not applicable" for each in without] == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("images", "more", "error", "message"),
    [
        (torch.zeros(4, 8, 8, 3), {}, DataError, r"must be \(N, 3, H, W\)"),
        (torch.full((4, 3, 8, 8), 2.0), {}, DataError, "floats in"),
        (torch.zeros(4, 3, 9, 9), {}, DataError, "the model takes"),
        (torch.zeros(4, 3, 8, 8), {"method": "cbd"}, ConfigError, "backbone without a head"),
        (torch.zeros(4, 3, 8, 8), {"method": "none"}, ConfigError, "it must be auto, shortcut"),
        ("nowhere", {}, DataError, "is no folder"),
        ("photos", {"out": "x.txt"}, ConfigError, "it must end in"),
        (np.zeros((4, 3, 8, 8)), {}, DataError, "images are of the type ndarray"),
        (None, {}, DataError, "images are of the type NoneType"),
        (torch.zeros(4, 3, 8, 8).to("meta"), {}, DataError, "images are without values"),
        (torch.zeros(4, 3, 8, 8).cfloat(), {}, DataError, "images are torch.complex64"),
        ("photos", {"settings": {"model.weights": "x.pth"}}, ConfigError, "model.weights is set"),
        ("photos", {"settings": {"run": "elsewhere"}}, ConfigError, "settings: run is set by"),
    ],
)
def test_wrong_arguments_are_told(place, images, more, error, message):
    with pytest.raises(error, match=message):
        bdclean.purify(Own(), images, **{**FACTS, **more})


def test_what_is_no_model_and_no_number_of_images_is_told(place):
    with pytest.raises(
        ConfigError, match="model is of the type OrderedDict; it must be a weights file"
    ):
        bdclean.check(Own().state_dict(), place, **FACTS)
    with pytest.raises(ConfigError, match="count=0: it must be at least 1"):
        bdclean.check(Own(), place, count=0, **FACTS)


def test_the_callers_settings_of_torch_do_no_harm_and_stay(place):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = bdclean.check(Own().float(), place[:100], **FACTS)
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].state != "not applicable"


def test_the_package_is_imported_in_no_time():
    code = (
        "import sys, bdclean; dir(bdclean)\n"
        "assert 'purify' in dir(bdclean) and not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
