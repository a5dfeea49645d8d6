"""Which score ranks poisoned samples lowest: what is measured, and the page of its record."""

import json
from pathlib import Path

import advrbd_score
import pytest
import torch

from bdclean.backbones import build
from bdclean.backbones.split import ModelInfo


def test_auroc_counts_pairs():
    low, high = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 4.0])
    pairs = [(a < b) + (a == b) / 2 for a in low.tolist() for b in high.tolist()]
    assert advrbd_score.auroc(low, high) == pytest.approx(100 * sum(pairs) / 6)


def test_margin_is_that_of_the_class_named_before():
    logits, named = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 9.0]]), torch.tensor([0, 1])
    assert advrbd_score.margin(logits, named).tolist() == [1.0, -5.0]


def test_the_joins_of_patches():
    changes = torch.tensor([[3.0, 1.0], [1.0, 5.0], [2.0, 9.0]])
    made = {name: join(changes).tolist() for name, join in advrbd_score.joins().items()}
    assert made == {
        "least": [1.0, 1.0],
        "second least": [2.0, 5.0],
        "median": [2.0, 5.0],
        "mean": [2.0, 5.0],
    }


def test_all_patches_are_tried_in_both_ways():
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", 3, 16, (0.5,) * 3, (0.25,) * 3, 4, "cifar")).eval()
    made = advrbd_score.changes_of(model, torch.rand(4, 3, 16, 16))
    assert {name: tuple(each.shape) for name, each in made.items()} == {
        f"{place}, {inner}, {change}": (count, 4)
        for place, count in (("drawn", 6), ("grid", 9))
        for inner in ("kl", "ce")
        for change in ("kl", "margin")
    }
    assert all((made[name] >= -1e-6).all() for name in made if name.endswith("kl, kl"))


def test_the_page_shows_its_record():
    folder = Path(advrbd_score.__file__).parent
    lines = json.loads((folder / "record.json").read_text())
    assert advrbd_score.markdown(lines) in (folder / "README.md").read_text()
    default = ("3 drawn, kl, kl", "least")
    for line in lines:  # what the page concludes
        scores = {(each["patches"], each["join"]): each for each in line["scores"]}
        margin, grid = scores["9 grid, ce, margin", "median"], scores["9 grid, kl, kl", "least"]
        own = scores[default]
        better = margin["auroc"] > own["auroc"] + 5
        assert better == (line["attack"] == "BadNets")
        assert abs(grid["auroc"] - scores["6 drawn, kl, kl", "least"]["auroc"]) < 3
        more = scores["9 grid, ce, kl", "least"]["auroc"] - own["auroc"]
        assert 0 <= more < 5
        assert better or line["attack"] == "Blend" or own["auroc"] - margin["auroc"] > 9.5
        if line["attack"] == "AdaptiveBlend":
            assert own["auroc"] < 60
            assert margin["auroc"] < 30
