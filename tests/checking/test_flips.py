from dataclasses import replace

import pytest
import torch
from torch import nn

from bdclean.backbones import ModelInfo, build
from bdclean.checking import PROBES, Flips, count_flips, gather_features
from bdclean.functional.families import Patch, Universal


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(ModelInfo("resnet18", 4, 16, (0.5,) * 3, (0.25,) * 3, width=4)).train()


@pytest.fixture
def images():
    return torch.rand(150, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Planted:
    """Names two classes by brightness, and class 3 where some pixel is pure red."""

    def __init__(self, *_):
        pass

    def features(self, x):
        bright = 8 * (x.mean((1, 2, 3)) - 0.5)
        red = (x[:, 0] - x[:, 1] - x[:, 2]).amax((1, 2))
        return torch.stack([bright, -bright, 0 * bright - 9, 20 * (red - 0.5)], 1)


def test_flips_pile_up_along_a_backdoor(model, monkeypatch):
    monkeypatch.setattr("bdclean.checking.flips.Perturber", Planted)
    model.head = nn.Identity()
    images = torch.tensor([0.2, 0.8]).repeat(75)[:, None, None, None].expand(150, 3, 16, 16)
    families = {"patch": Patch((0.25, 0.25), 10, 0.3), "small": Universal((1.0, 1.0), 4, 0.5)}
    patch, small = count_flips(model, images, families)
    assert patch.concentration.favourite == 3
    assert patch.concentration.piled > 0.8
    assert not sum(small.landed)


def test_counts(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    few = {name: replace(family, steps=2) for name, family in PROBES.items()}
    found = list(count_flips(model, images, few, seed=1))
    assert [each.family for each in found] == list(PROBES)
    assert all(each.images == 150 and len(each.landed) == 4 for each in found)
    assert all(0 < sum(each.landed) <= 150 for each in found[:1])
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert model.training
    assert found == list(count_flips(model, images, few, seed=1))
    assert found != list(count_flips(model, images, few, seed=2))
    shares = Flips("ball", 10, (1, 0, 3, 0)).concentration
    assert (shares.flipped, shares.share, shares.favourite) == (0.4, 0.75, 2)


def test_features_gather_along_a_backdoor(model, monkeypatch):
    monkeypatch.setattr("bdclean.checking.flips.Perturber", Planted)
    images = torch.tensor([0.2, 0.8]).repeat(75)[:, None, None, None].expand(150, 3, 16, 16)
    families = {"patch": Patch((0.25, 0.25), 10, 0.3), "small": Universal((1.0, 1.0), 4, 0.5)}
    patch, small = gather_features(model, images, families)
    assert patch.gathering.share > 0.8
    assert patch.gathering.point.argmax() == 3
    assert small.gathering.point.argmax() != 3
    assert patch.images == 150
    assert model.training
