"""Our ResNets against torchvision's, and the stems."""

import math

import pytest
import torch
import torchvision

from bdclean.backbones import ModelInfo, build, resnet18, resnet34
from bdclean.errors import ConfigError


@pytest.mark.parametrize(("make", "name"), [(resnet18, "resnet18"), (resnet34, "resnet34")])
def test_names_and_shapes_are_torchvisions(make, name):
    theirs = torchvision.models.get_model(name, weights=None).state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    ours = make(stem="imagenet").state_dict()
    assert {key: value.shape for key, value in ours.items()} == shapes


def test_features_are_torchvisions():
    theirs = torchvision.models.resnet18(weights=None)
    theirs.fc = torch.nn.Identity()
    ours = resnet18(stem="imagenet")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_cifar_stem_keeps_the_resolution():
    model = resnet18(width=8, stem="cifar")
    assert model.conv1.kernel_size == (3, 3)
    assert model.conv1.stride == (1, 1)
    sizes = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert sizes == [32, 16, 8, 4]


@pytest.mark.parametrize(("size", "stem"), [(28, "cifar"), (64, "cifar"), (65, "imagenet")])
def test_auto_stem_follows_the_image_size(size, stem):
    info = ModelInfo("resnet18", None, size, (0.5,) * 3, (0.5,) * 3, width=8)
    assert build(info).info.stem == stem


def test_initialisation_is_he_with_fan_out():
    torch.manual_seed(0)
    model = resnet18(width=32)
    weight = model.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert torch.equal(model.bn1.weight, torch.ones(32))


def test_width_below_one_is_refused():
    with pytest.raises(ConfigError, match="width=0"):
        resnet18(width=0)
