import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from bdclean.backbones import ModelInfo, build
from bdclean.backbones.batchnorm import batch_norms, momentum_of, reestimate_
from bdclean.backbones.fold import frozen_copy
from bdclean.backbones.perturber import Perturber

FACTS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.25)}


def make(arch="resnet18", size=16):
    width = {"resnet18": 4, "mobilenet_v2": 16}[arch]
    torch.manual_seed(0)
    model = build(ModelInfo(arch, 3, size, width=width, **FACTS))
    return shake(model, size)


def shake(model, size=16):
    """Other weights, and statistics that are not at their start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()
        for _ in range(3):
            model(torch.rand(8, 3, size, size))
    return model


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 16), ("mobilenet_v2", 32)])
def test_refreshed_copy_is_the_model_in_evaluation_mode(arch, size):
    model = make(arch, size)
    folded = frozen_copy(model)
    assert len(folded.folded) == len(batch_norms(model))  # nothing is left out
    images = torch.rand(4, 3, size, size)
    shake(model, size)
    with torch.no_grad():
        stale, wanted = folded(images), model.copy().eval().features(images)
        assert not torch.allclose(stale, wanted, rtol=1e-2, atol=1e-2)
        before = copy.deepcopy(model.state_dict())
        folded.refresh_(model)
        torch.testing.assert_close(folded(images), wanted, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(not p.requires_grad for p in folded.parameters())


def test_refreshed_copy_in_bfloat16_is_the_new_copy():
    model = make()
    folded = frozen_copy(model, torch.bfloat16)
    folded.refresh_(shake(model))
    new, images = frozen_copy(model, torch.bfloat16), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(folded(images), new(images), rtol=2e-2, atol=2e-2)
    assert {p.dtype for p in folded.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attacker_gives_the_features_of_its_mode(mode):
    model = make()
    attacker = Perturber(model, mode)
    attacker.refresh_(shake(model))
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    features = attacker.features(images)
    features.square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    wanted = model.copy().train(mode == "train").features(images)
    torch.testing.assert_close(features, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout(0.9), StochasticDepth(0.9, "row"), DropPath(0.9)],
    ids=lambda d: d._get_name(),
)
def test_attacker_switches_dropout_of_any_kind_off(dropout):
    model = make("mobilenet_v2", 32)
    model.backbone.features.append(dropout)
    attacker = Perturber(model, "train")
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(attacker.features(images), attacker.features(images))


def test_momentum_is_put_back():
    model = make()
    before = model.backbone.bn1.running_mean.clone()
    with momentum_of(model, 0.0):
        model.features(torch.rand(4, 3, 16, 16))
    assert torch.equal(before, model.backbone.bn1.running_mean)
    assert {norm.momentum for norm in batch_norms(model)} == {0.1}


def test_reestimated_statistics_are_the_mean_over_batches():
    model, batches = make(), [torch.rand(4, 3, 16, 16) for _ in range(3)]
    seen = [model.backbone.conv1(model.normalize(images)) for images in batches]
    reestimate_(model, model.features, batches)
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var(dim=(0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.backbone.bn1.running_mean, mean)
    torch.testing.assert_close(model.backbone.bn1.running_var, variance)
