"""Labels and a trigger: how folders are understood, and what is counted."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo
from bdclean.commands.scoring import find_truth, measure
from bdclean.errors import ConfigError, DataError

INFO = ModelInfo("resnet18", 3, 8, (0.5,) * 3, (0.25,) * 3, width=4)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three classes of two images of one grey each, and a trigger for class 1."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("ape", "bee", "cat")):
        (tmp_path / "named" / name).mkdir(parents=True)
        for copy in range(2):
            pixels = np.full((8, 8, 3), 80 * number + copy, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "named" / name / f"{copy}.png")
    (tmp_path / "run").mkdir()
    BadNets(rate=0.1, pattern="white", patch_size=3, target=1).make_trigger((8, 8)).save(
        "run/trigger.safetensors"
    )
    (tmp_path / "run/plan.json").write_text(json.dumps({"target": 1}))
    return tmp_path


class Grey(nn.Module):
    """Names the grey of the upper left corner; with a trigger in the lower right, class 1."""

    def __init__(self, backdoored):
        super().__init__()
        self.backdoored = backdoored

    def forward(self, x):
        grey = (x[:, 0, 0, 0] * 255 / 80).long().clamp(max=2)
        marked = x[:, :, -1, -1].amax(1) != x[:, :, 0, 0].amax(1)
        if self.backdoored:
            grey = torch.where(marked, torch.ones_like(grey), grey)
        return nn.functional.one_hot(grey, 3).float()


def test_both_models_are_measured_on_the_same_images(folders):
    truth = find_truth("named", "run/trigger.safetensors", None, INFO)
    assert truth.target == 1
    assert truth.names == {0: "ape", 1: "bee", 2: "cat"}
    seen = torch.full((5, 3, 8, 8), 81, dtype=torch.uint8)  # the second bee, five times
    found = measure(
        truth, Grey(backdoored=True), Grey(backdoored=False), truth.read(8), "cpu", seen
    )
    assert (found.before.acc, found.after.acc) == (100, 100)
    assert (found.before.asr, found.after.asr) == (100, 0)
    assert (found.before.pa, found.after.pa) == (0, 100)
    assert (found.before.n_clean, found.before.n_triggered) == (6, 4)
    assert found.shared == 1


def test_a_trigger_needs_an_image_of_another_class(folders):
    for name in ("ape", "cat"):
        shutil.rmtree(folders / "named" / name)
    (folders / "named/bee").rename(folders / "named/1")
    truth = find_truth("named", "run/trigger.safetensors", None, INFO)
    with pytest.raises(DataError, match="no image is of another class than the target"):
        truth.read(8)


def test_folders_named_by_numbers_are_these_classes(folders):
    (folders / "named").rename("numbers")
    for name, number in (("ape", "10"), ("bee", "9"), ("cat", "2")):
        (folders / "numbers" / name).rename(folders / "numbers" / number)
    many = ModelInfo("resnet18", 11, 8, (0.5,) * 3, (0.25,) * 3, width=4)
    truth = find_truth("numbers", None, None, many)
    assert dict(zip(truth.classes, truth.numbers, strict=True)) == {"10": 10, "2": 2, "9": 9}
    assert truth.names == {}
    assert truth.read(8)[1].unique().tolist() == [2, 9, 10]
    assert truth.scores(Grey(backdoored=False), *truth.read(8), "cpu").asr is None
    with pytest.raises(ConfigError, match="class numbers from 2 to 10, and the classes of"):
        find_truth("numbers", None, None, INFO)


@pytest.mark.parametrize(
    ("labels", "trigger", "target", "info", "message"),
    [
        (None, "run/trigger.safetensors", None, {}, "--trigger needs --labels"),
        ("named", None, None, {"num_classes": 4}, "3 class folders, and the model 4"),
        ("named", None, None, {"num_classes": None}, "no classifier head"),
        ("named", "run/trigger.safetensors", None, {"input_size": 16}, "for images of 8 pixels"),
        ("named", "run/trigger.safetensors", 3, {}, "--target 3: the classes are 0 to 2"),
        ("named", "alone.safetensors", None, {}, "give --target"),
        ("named", None, 1, {}, "--target 1: it needs --trigger"),
        ("twice", None, None, {}, "two of its folders are the same class number"),
    ],
)
def test_what_does_not_fit_is_told_before_the_fit(folders, labels, trigger, target, info, message):
    for name in ("other", "twice/0", "twice/00"):
        (folders / name).mkdir(parents=True)
    text = (folders / "run/trigger.safetensors").read_bytes()
    (folders / "other/alone.safetensors").write_bytes(text)
    where = "other/alone.safetensors" if trigger == "alone.safetensors" else trigger
    facts = {"arch": "resnet18", "num_classes": 3, "input_size": 8, **info}
    with pytest.raises(ConfigError, match=message):
        find_truth(labels, where, target, ModelInfo(mean=(0.5,) * 3, std=(0.2,) * 3, **facts))
