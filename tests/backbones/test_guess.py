"""Foreign weights without the name of their architecture."""

import time
import warnings

import pytest
import timm
import torch
import torchvision

from bdclean.backbones import ModelInfo, build, load_model
from bdclean.backbones.architectures import is_made_for_a_size
from bdclean.backbones.guess import guess, known_networks, nearest
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.source import WeightsSource
from bdclean.errors import ConfigError, WeightsError
from bdclean.weights import Nest

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _own(arch, width, stem, size=32):
    """As torchvision writes it."""
    torch.manual_seed(0)
    model = build(ModelInfo(arch, 3, size, HALF, HALF, width, stem))
    head = {"fc.weight": model.head.weight, "fc.bias": model.head.bias}
    return {**model.backbone.state_dict(), **head}


def _kuangliu(arch, width):
    state = _own(arch, width, "cifar").items()
    return {k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in state}


def _torchvision(name, **options):
    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=4, **options).state_dict()


def _timm(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=4, **options).state_dict()


def _prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _headless(state, head):
    return {name: tensor for name, tensor in state.items() if not name.startswith(head)}


def _numbered(state):
    """A resnet in an `nn.Sequential`."""
    numbers = {"conv1": "0", "bn1": "1"} | {f"layer{n + 1}": f"{n + 4}" for n in range(4)}
    parts = ((name.partition("."), tensor) for name, tensor in _headless(state, "fc").items())
    return {f"{numbers[first]}.{rest}": tensor for (first, _, rest), tensor in parts}


def _guesses(state, **known):
    nests = [Nest("state_dict", state), Nest("optimizer", {"0": torch.zeros(2, 2)})]
    return [
        (each.info.arch, each.info.width, each.info.stem, each.info.input_size)
        for each in guess(nests, "x", **known)
    ]


def _library(arch, size=224):
    return [(arch, 64, "imagenet", size)]


# What makes the state dict, and what it is taken for.
ONE = {
    "ours": (lambda: _own("resnet18", 5, "cifar"), [("resnet18", 5, "cifar", 32)]),
    "ours, deep": (lambda: _own("resnet34", 3, "imagenet"), [("resnet34", 3, "imagenet", 224)]),
    "ours, full": (lambda: _own("resnet18", 64, "cifar"), [("resnet18", 64, "cifar", 32)]),
    "kuangliu": (lambda: _kuangliu("resnet34", 8), [("resnet34", 8, "cifar", 32)]),
    "twice": (
        lambda: {
            **_prefixed(_own("resnet18", 4, "cifar"), "student."),
            **_prefixed(_own("resnet18", 4, "cifar"), "teacher."),
        },
        [("resnet18", 4, "cifar", 32)],
    ),
    "resnet18": (lambda: _torchvision("resnet18"), _library("torchvision:resnet18")),
    "resnet18 of timm": (lambda: _timm("resnet18"), _library("torchvision:resnet18")),
    "resnet50": (
        lambda: _prefixed(_torchvision("resnet50"), "module.encoder_q."),
        _library("torchvision:resnet50"),
    ),
    "numbered": (lambda: _numbered(_torchvision("resnet18")), _library("torchvision:resnet18")),
    "vgg": (lambda: _torchvision("vgg11_bn"), _library("torchvision:vgg11_bn")),
    "mobilenet": (
        lambda: _torchvision("mobilenet_v3_small"),
        _library("torchvision:mobilenet_v3_small"),
    ),
    "vit": (lambda: _torchvision("vit_b_16"), _library("torchvision:vit_b_16")),
    "vit of 64 pixels": (
        lambda: _torchvision("vit_b_16", image_size=64),
        _library("torchvision:vit_b_16", 64),
    ),
    "vit of 384 pixels": (
        lambda: _timm("vit_tiny_patch16_384"),
        _library("timm:vit_tiny_patch16_384", 384),
    ),
    "convnext": (lambda: _timm("convnext_atto"), _library("timm:convnext_atto")),
    "without head": (
        lambda: _headless(_timm("convnext_atto"), "head.fc"),
        _library("timm:convnext_atto"),
    ),
}


@pytest.mark.parametrize("kind", ONE)
def test_the_only_architecture_that_fits(kind):
    make, taken = ONE[kind]
    assert _guesses(make()) == taken


def test_no_guess_takes_long():
    known_networks()
    state = _torchvision("resnet50")
    start = time.process_time()
    guess([Nest("", state)], "x")
    assert time.process_time() - start < 2


# What makes the state dict, what is known, and what it may be.
SEVERAL = {
    "mean and std": (
        lambda: _timm("vit_tiny_patch16_224"),
        {},
        ["timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224"],
    ),
    "mean and std that are known": (
        lambda: _timm("deit_tiny_patch16_224"),
        {"colours_known": True},
        ["timm:vit_tiny_patch16_224"],
    ),
    "size": (
        lambda: _timm("maxxvitv2_rmlp_base_rw_224"),
        {},
        ["timm:maxxvitv2_rmlp_base_rw_224", "timm:maxxvitv2_rmlp_base_rw_384"],
    ),
    "padding": (
        lambda: _timm("efficientnet_b0"),
        {"colours_known": True},
        ["timm:efficientnet_b0", "timm:tf_efficientnet_b0"],
    ),
    "strides": (
        lambda: _own("mobilenet_v2", 64, "cifar"),
        {},
        ["mobilenet_v2", "torchvision:mobilenet_v2"],
    ),
    "strides that the size tells": (
        lambda: _own("mobilenet_v2", 64, "cifar"),
        {"given": {"input_size": 32}},
        ["mobilenet_v2"],
    ),
    "strides that the large size tells": (
        lambda: _own("mobilenet_v2", 64, "cifar"),
        {"given": {"input_size": 224}},
        ["torchvision:mobilenet_v2"],
    ),
    "solo-learn": (
        lambda: {
            **_prefixed(_headless(_own("resnet18", 64, "cifar"), "fc"), "backbone."),
            **{"classifier.weight": torch.zeros(2, 512), "classifier.bias": torch.zeros(2)},
            "projector.0.weight": torch.zeros(8, 512),
            "projector.0.bias": torch.zeros(8),
        },
        {},
        ["resnet18", "solo:resnet18"],
    ),
    "another width": (lambda: _own("resnet18", 4, "cifar"), {"given": {"width": 8}}, []),
    "another stem": (lambda: _torchvision("resnet18"), {"given": {"stem": "cifar"}}, []),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_what_is_known_decides(kind):
    make, known, names = SEVERAL[kind]
    assert [arch for arch, *_ in _guesses(make(), **known)] == names


def test_several_are_listed_with_what_they_differ_in(tmp_path):
    path = tmp_path / "x.pth"
    state = _timm("vit_tiny_patch16_224").items()
    torch.save({"model": {name: torch.zeros(tensor.shape) for name, tensor in state}}, path)
    with pytest.raises(ConfigError) as told:
        load_model(path)
    assert str(told.value) == (
        f"{path} fits several architectures: timm:vit_tiny_patch16_224 (mean 0.5 0.5 0.5, std "
        "0.5 0.5 0.5), timm:deit_tiny_patch16_224 (mean 0.485 0.456 0.406, std 0.229 0.224 0.225); "
        "name one with arch, on the command line --model.arch."
    )
    with pytest.warns(UserWarning, match=r"taken for timm:vit_tiny_patch16_224 by its 152 tensors"):
        model = load_model(path, mean=MEAN, std=STD)
    assert (model.info.input_size, model.info.mean) == (224, MEAN)
    named = load_model(path, arch="vit_tiny_patch16_224")
    assert (named.info.input_size, named.info.mean, named.info.std) == (224, HALF, HALF)
    source = WeightsSource(str(path), None, None, 32, MEAN, STD)
    with pytest.raises(WeightsError, match=r"It fits input_size=224; .* --data\.input_size 224\.$"):
        source.load()
    torch.save(_own("mobilenet_v2", 16, "cifar"), path)
    listed = r"\(stem cifar, input_size 32\).*; name one with input_size, .*--data\.input_size\.$"
    with pytest.raises(ConfigError, match=listed):
        load_model(path)
    with pytest.warns(UserWarning, match="taken for mobilenet_v2"):
        assert load_model(path, input_size=32).info.stem == "cifar"


def test_one_line_says_what_a_file_is_taken_for(tmp_path):
    path, x = tmp_path / "x.pth", torch.rand(2, 3, 64, 64)
    theirs = torchvision.models.resnet18(num_classes=4).eval()
    torch.save({"state_dict": _prefixed(theirs.state_dict(), "module.")}, path)
    with pytest.warns(UserWarning, match="taken for") as told:
        model = load_model(path).eval()
    assert [str(each.message) for each in told] == [
        f"{path}: taken for torchvision:resnet18 by its 122 tensors, input_size 224, mean 0.485 "
        "0.456 0.406, std 0.229 0.224 0.225; --model.arch names another."
    ]
    with torch.no_grad():
        assert torch.equal(model(x), theirs(model.normalize(x)))
    source = WeightsSource(str(path), None, None, 64, HALF, HALF)
    with pytest.warns(UserWarning, match="taken for") as told:
        model = source.load()
    assert model.info == ModelInfo("torchvision:resnet18", 4, 64, HALF, HALF, stem="imagenet")
    assert [str(each.message) for each in told] == [
        f"{path}: taken for torchvision:resnet18 by its 122 tensors; it was published with mean "
        "0.485 0.456 0.406 and std 0.229 0.224 0.225; --model.arch names another."
    ]


def test_a_narrow_network_of_ours_is_whole(tmp_path):
    path = tmp_path / "x.pth"
    state = _kuangliu("resnet18", 6)
    torch.save({"net": state, "acc": 95.0, "epoch": 3}, path)
    said = r"resnet18 by its 122 tensors, width 6, stem cifar, input_size 32, mean 0\.485"
    with pytest.warns(UserWarning, match=said):
        model = load_model(path)
    assert torch.equal(model.head.weight, state["linear.weight"])
    with pytest.warns(UserWarning, match="width 6, stem cifar, mean"):
        assert load_model(path, input_size=96).info.stem == "cifar"


def test_what_fits_nothing_is_told_with_the_nearest(tmp_path):
    state = _torchvision("resnet50")
    assert not _guesses(state | {"extra.weight": torch.zeros(3, 3)})
    said = nearest([Nest("", state | {"extra.weight": torch.zeros(3, 3)})], "x")
    assert said == " It is nearest to torchvision:resnet50, with 1 unexpected (extra.weight)."
    torch.save(_own("resnet18", 4, "cifar") | {"extra.weight": torch.zeros(3, 3)}, tmp_path / "x")
    with pytest.raises(ConfigError, match=r"name it with arch.*nearest to resnet18, with 1 unexp"):
        load_model(tmp_path / "x")


HOSTILE = {
    "a million odd names": lambda: {f"{n}.a.b.c": ROW for n in range(1_000_000)},
    "thousands of first layers": lambda: {
        f"{n}.conv1.weight": torch.empty(n + 1, 3, 3, 3, device="meta") for n in range(5_000)
    },
    "shapes of everything": lambda: {
        f"{n}.{copy}": torch.empty(shape, device="meta")
        for n, shape in enumerate({s for each in known_networks() for s in each.weights})
        for copy in range(4)
    },
    "dictionaries of dictionaries": None,
}
ROW = torch.zeros(1)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_given_up_within_a_second(kind):
    known_networks()
    make = HOSTILE[kind]
    nests = [Nest("", make())] if make else [Nest(f"{n}", {"a": ROW}) for n in range(10_000)]
    start = time.process_time()
    assert guess(nests, "x") == []
    assert nearest(nests, "x") == ""
    assert time.process_time() - start < 1


SAMPLE = (
    *("torchvision:densenet121", "torchvision:swin_t", "torchvision:regnet_y_400mf"),
    *("timm:resnet26d", "timm:mixer_s32_224", "timm:pvt_v2_b0", "timm:levit_128s"),
)


@pytest.mark.parametrize("arch", SAMPLE)
def test_the_index_agrees_with_the_installed_libraries(arch):
    (network,) = (
        each for each in known_networks() if any(arch in names for names in each.functions)
    )
    info = ModelInfo(arch, None, 224, HALF, HALF, stem="imagenet")
    state = shapes(info, "x", 1).backbone.state_dict()
    there = [tuple(tensor.shape) for tensor in state.values() if tensor.ndim > 1]
    share = network.weights.total() / len(there)  # that does not depend on the size of images
    assert share > 0.5 if is_made_for_a_size(arch) else share == 1
    assert all(there.count(shape) >= count for shape, count in network.weights.items())


def test_the_index_knows_nearly_all_architectures():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        installed = {f"timm:{name}" for name in timm.list_models()}
    models = torchvision.models.list_models(module=torchvision.models)
    installed |= {f"torchvision:{name}" for name in models}
    known = {arch for each in known_networks() for names in each.functions for arch in names}
    assert len(installed & known) > 0.9 * len(installed)
