"""The networks for small images that published victims use, against their published form."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdclean.backbones import (
    ModelInfo,
    build,
    frozen_copy,
    load_model,
    ordered_blocks,
    save_like,
    save_model,
)
from bdclean.backbones.cifar import CIFAR
from bdclean.backbones.perturber import Perturber
from bdclean.errors import ConfigError
from bdclean.purification.bcu import BCU
from bdclean.types import ImageFacts

HALF = (0.5, 0.5, 0.5)
# Trainable numbers with ten classes, of the public code.
PUBLISHED = {
    "preact_resnet18": 11_171_146,
    "preact_resnet34": 21_279_306,
    "preact_resnet50": 23_509_066,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "wrn16_1": 175_066,
    "wrn28_10": 36_479_194,
    "vgg11_cifar": 9_231_114,
    "vgg13_cifar": 9_416_010,
    "vgg16_cifar": 14_728_266,
    "vgg19_cifar": 20_040_522,
}
TINY = {
    "preact_resnet18": 4,
    "preact_resnet50": 2,
    "resnet20": 8,
    "wrn16_2": 8,
    "vgg11_cifar": 4,
}
# Blocks of the network, without stem and head, and the groups that they are in.
BLOCKS = {
    "preact_resnet18": [1, 1, 2, 2, 3, 3, 4, 4],
    "resnet20": [1, 1, 1, 2, 2, 2, 3, 3, 3],
    "wrn16_2": [1, 1, 2, 2, 3, 3],
    "vgg11_cifar": [1, 2, 2, 3, 3, 4, 4],
}


def _network(arch, num_classes=5, size=32):
    """A tiny model whose batch norms have statistics of their own, in evaluation mode."""
    torch.manual_seed(0)
    model = build(ModelInfo(arch, num_classes, size, HALF, HALF, width=TINY[arch]))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval()


@pytest.fixture(params=TINY, scope="module")
def model(request):
    return _network(request.param)


def _as_published(model):
    """The state dict as the public code of the architecture writes it."""
    head = CIFAR[model.info.arch].head
    own = {f"{head}.{name}": tensor for name, tensor in model.head.state_dict().items()}
    return {**model.backbone.state_dict(), **own}


@pytest.fixture(scope="module")
def foreign(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "net.pth"
    torch.save({"net": _as_published(model), "acc": 93.1, "epoch": 7}, path)
    return path


# ---------------------------------------------------------------------- as published


@pytest.mark.parametrize("arch", PUBLISHED)
def test_it_has_as_many_numbers_as_published(arch):
    with torch.device("meta"):
        made = build(ModelInfo(arch, 10, 32, HALF, HALF))
    assert sum(parameter.numel() for parameter in made.parameters()) == PUBLISHED[arch]


NAMES = {
    "preact_resnet50": "layer2.0.bn3.weight layer2.0.conv3.weight layer2.0.shortcut.0.weight",
    "resnet20": "conv1.weight bn1.running_var layer3.2.bn2.weight",
    "wrn16_2": "block1.layer.0.convShortcut.weight block3.layer.1.conv2.weight bn1.weight",
    "vgg11_cifar": "features.0.bias features.1.running_mean features.25.weight",
}


@pytest.mark.parametrize("arch", NAMES)
def test_names_are_those_of_published_files(arch):
    assert set(NAMES[arch].split()) <= _network(arch).backbone.state_dict().keys()


class _Plain:
    """Layers by their names in a state dict."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def norm(self, name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{key}"] for key in keys))

    def has(self, name):
        return f"{name}.weight" in self.state

    def preactivated(self, name, x, stride, shortcut):
        y = F.relu(self.norm(f"{name}.bn1", x))
        side = self.conv(f"{name}.{shortcut}", y, stride) if self.has(f"{name}.{shortcut}") else x
        y = self.conv(f"{name}.conv1", y, 1 if self.has(f"{name}.conv3") else stride)
        y = F.relu(self.norm(f"{name}.bn2", y))
        y = self.conv(f"{name}.conv2", y, stride if self.has(f"{name}.conv3") else 1)
        if self.has(f"{name}.conv3"):
            y = self.conv(f"{name}.conv3", F.relu(self.norm(f"{name}.bn3", y)))
        return y + side

    def padded(self, name, x, stride):
        y = F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride)))
        y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y))
        if stride == 2:
            zeros = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:])
            x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
        return F.relu(y + x)

    def row(self, name, x, stride, block, *more):
        number = 0
        while self.has(f"{name}.{number}.conv1"):
            x = block(f"{name}.{number}", x, stride if number == 0 else 1, *more)
            number += 1
        return x


def _expected(arch, state, x):
    net = _Plain(state)
    if arch.startswith("vgg"):
        for number in range(max(int(name.split(".")[1]) for name in state) + 1):
            name = f"features.{number}"
            if f"{name}.running_mean" in state:
                x = F.relu(net.norm(name, x))
            elif net.has(name):
                if f"features.{number - 3}.running_mean" in state:
                    x = F.max_pool2d(x, 2)
                x = net.conv(name, x)
        return F.max_pool2d(x, 2).flatten(1)
    x = net.conv("conv1", x)
    if arch.startswith("preact"):
        for layer, stride in zip((1, 2, 3, 4), (1, 2, 2, 2), strict=True):
            x = net.row(f"layer{layer}", x, stride, net.preactivated, "shortcut.0")
        return F.avg_pool2d(x, 4).flatten(1)
    if arch.startswith("wrn"):
        for layer, stride in zip((1, 2, 3), (1, 2, 2), strict=True):
            x = net.row(f"block{layer}.layer", x, stride, net.preactivated, "convShortcut")
        return F.avg_pool2d(F.relu(net.norm("bn1", x)), 8).flatten(1)
    x = F.relu(net.norm("bn1", x))
    for layer, stride in zip((1, 2, 3), (1, 2, 2), strict=True):
        x = net.row(f"layer{layer}", x, stride, net.padded)
    return F.avg_pool2d(x, 8).flatten(1)


@torch.no_grad()
def test_features_are_those_of_the_published_forward(model):
    x = torch.rand(2, 3, 32, 32)
    expected = _expected(model.info.arch, model.backbone.state_dict(), model.normalize(x))
    torch.testing.assert_close(model.features(x), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the contracts of a backbone


def test_own_files_come_back_exactly(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors").eval()
    assert loaded.info == model.info
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_published_files_are_recognised(model, foreign):
    with pytest.warns(UserWarning, match=f"taken for {model.info.arch} by its"):
        loaded = load_model(foreign, mean=HALF, std=HALF).eval()
    assert loaded.info == model.info
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_a_published_file_is_written_back_in_its_layout(model, foreign, tmp_path):
    loaded = load_model(foreign, arch=model.info.arch, width=model.info.width)
    save_like(foreign, loaded, tmp_path / "out.pth")
    before, after = (torch.load(path) for path in (foreign, tmp_path / "out.pth"))
    assert after["net"].keys() == before["net"].keys()
    assert all(torch.equal(after["net"][name], before["net"][name]) for name in after["net"])


def test_folded_features_are_the_same(model):
    x = torch.rand(2, 3, 32, 32)
    folded = frozen_copy(model)
    assert folded.folded
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.features(x), rtol=1e-4, atol=1e-5)


def test_a_folded_copy_follows_the_model(model):
    student = model.copy()
    perturber = Perturber(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
        perturber.refresh_(student)
        x = torch.rand(2, 3, 32, 32)
        expected = student.features(x)
        torch.testing.assert_close(perturber.features(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", BLOCKS)
def test_blocks_are_in_the_order_of_the_forward_pass(arch):
    model, order = _network(arch), []
    blocks = ordered_blocks(model)
    assert [block.group for block in blocks] == [0, *BLOCKS[arch], BLOCKS[arch][-1] + 1]
    assert {id(p) for b in blocks for p in b.parameters()} == set(map(id, model.parameters()))
    for number, block in enumerate(blocks):
        for module in block.modules:
            module.register_forward_hook(lambda *_, number=number: order.append(number))
    model(torch.rand(1, 3, 32, 32))
    assert order == sorted(order)
    assert set(order) == set(range(len(blocks)))


def test_bcu_draws_deep_blocks_anew(model):
    suspect = model.copy()
    student = BCU(ImageFacts(5, 32, HALF, HALF)).make_student(model.copy())
    pairs = zip(ordered_blocks(suspect), ordered_blocks(student), strict=True)
    changed = [
        sum(int((a != b).sum()) for a, b in zip(x.parameters(), y.parameters(), strict=True))
        / sum(parameter.numel() for parameter in x.parameters())
        for x, y in pairs
    ]
    assert changed[-2] > 0.15
    assert changed[-2] > 3 * changed[1]
    assert student(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_training_reaches_all_parameters(model):
    student = model.copy().train()
    student(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("arch", ["preact_resnet18", "resnet20", "wrn16_2", "vgg11_cifar"])
def test_larger_images_are_taken(arch):
    assert _network(arch, size=64)(torch.rand(1, 3, 64, 64)).shape == (1, 5)


# ---------------------------------------------------------------------- refusals and hints


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet20", "width": 10}, "width=10: resnet20 .* must be a multiple of 4"),
        ({"arch": "vgg16_cifar", "input_size": 28}, "input_size=28: it must be at least 32"),
        ({"arch": "wrn16_2", "stem": "imagenet"}, "stem='imagenet': wrn16_2 has its own"),
        ({"arch": "wrn17_2"}, "arch='wrn17_2' is unknown. Did you mean wrn"),
        ({"arch": "preactresnet18"}, "Did you mean preact_resnet18"),
        ({"arch": "timm:resnet18", "width": 8}, "preact_resnet18/34/50.* have a width"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    settings = {"num_classes": 5, "input_size": 32, "mean": HALF, "std": HALF} | changes
    with pytest.raises(ConfigError, match=message):
        build(ModelInfo(**settings))


def test_a_wrong_name_gets_the_right_one(tmp_path):
    model = _network("preact_resnet18")
    torch.save(_as_published(model), tmp_path / "net.pth")
    with pytest.raises(Exception, match="It fits arch=preact_resnet18, width=4; on"):
        load_model(tmp_path / "net.pth", arch="resnet18", width=4)


def test_mean_and_std_are_those_of_published_files(tmp_path):
    for arch, mean in (("resnet20", 0.485), ("wrn16_2", 0.4914)):
        path = tmp_path / f"{arch}.pth"
        torch.save(_as_published(_network(arch)), path)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert load_model(path).info.mean[0] == mean
        assert f"mean {mean}" in str(told[-1].message)


def test_a_file_of_torchvision_is_not_taken_for_a_vgg_of_cifar(tmp_path):
    """Its convolutions have the same names and shapes; hidden layers follow them."""
    model = _network("vgg11_cifar")
    state = model.backbone.state_dict() | {
        "classifier.0.weight": torch.zeros(16, 32 * 49),
        "classifier.0.bias": torch.zeros(16),
        "classifier.3.weight": torch.zeros(16, 16),
        "classifier.3.bias": torch.zeros(16),
        "classifier.6.weight": torch.zeros(5, 16),
        "classifier.6.bias": torch.zeros(5),
    }
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ConfigError, match="does not say which architecture"):
        load_model(tmp_path / "net.pth")
