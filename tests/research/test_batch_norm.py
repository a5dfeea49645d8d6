"""Which statistics a product carries: what is measured, and the page of its record."""

import json
from pathlib import Path

import batch_norm
import pytest
import torch

from bdclean.backbones import build
from bdclean.backbones.batchnorm import batch_norms
from bdclean.backbones.split import ModelInfo

INFO = ModelInfo("resnet18", 3, 16, (0.5,) * 3, (0.25,) * 3, 4, "cifar")


@pytest.fixture
def models():
    torch.manual_seed(0)
    return build(INFO), build(INFO)


def test_the_suspects_statistics_come_without_its_weights(models):
    ours, theirs = models
    theirs.train()
    theirs(torch.rand(8, 3, 16, 16))
    made = batch_norm.with_statistics(ours, theirs)
    for own, norm, other in zip(
        *(batch_norms(each.backbone) for each in (ours, made, theirs)), strict=True
    ):
        assert torch.equal(norm.running_mean, other.running_mean)
        assert torch.equal(norm.running_var, other.running_var)
        assert not torch.equal(norm.running_mean, own.running_mean)
    assert torch.equal(made.head.weight, ours.head.weight)


def test_neighbours_are_the_nearest_others(models):
    model, _ = models
    images = torch.rand(6, 3, 16, 16)
    images[3], images[5] = images[0] + 1e-4, images[1] + 1e-4
    nearest = batch_norm.neighbours(model, list(images.split(4)))
    assert nearest[[0, 3, 1, 5]].tolist() == [3, 0, 5, 1]
    assert not (nearest == torch.arange(6)).any()


def test_the_page_shows_its_record():
    folder = Path(batch_norm.__file__).parent
    lines = json.loads((folder / "record.json").read_text())
    assert batch_norm.markdown(lines) in (folder / "README.md").read_text()
    for line in lines:  # what the page concludes
        made = {each["variant"]: each for each in line["variants"]}
        own = [made[name] for name in made if name not in ("victim", "running, suspect's")]
        assert len(own) == 4
        if line["attack"] != "SIG":
            assert max(each["asr"] for each in own) - min(each["asr"] for each in own) < 1
        if line["data"] == "digits":
            continue
        for name in "running", "separate":
            again = made[f"{name}, re-estimated"]
            assert all(again[key] < made[name][key] for key in ("neighbours", "acc"))
            assert line["attack"] != "SIG" or again["asr"] > made[name]["asr"]
        assert max(own, key=lambda each: each["neighbours"]) is made["running"]
        assert made["running"]["acc"] - made["running, suspect's"]["acc"] > 10
