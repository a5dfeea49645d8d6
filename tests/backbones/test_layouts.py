"""How public repositories lay out their checkpoints: which network is read, and what is told."""

import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torchvision
from factors import FACTORS
from torch import nn
from torch.nn.utils import spectral_norm

from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.backbones.architectures import Parts, make_parts
from bdclean.backbones.beside import take_head, take_training_only
from bdclean.backbones.build import start_from
from bdclean.backbones.classifiers import find_classifiers
from bdclean.backbones.source import WeightsSource
from bdclean.errors import ConfigError, WeightsError
from bdclean.types import ImageFacts
from bdclean.weights import multiplied_out

HALF = (0.5, 0.5, 0.5)
WIDTH, FEATURES, CLASSES = 4, 32, 3
NUMBERS = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
MLP = {"0.weight": torch.ones(8, FEATURES), "0.bias": torch.ones(8), "2.weight": torch.ones(4, 8)}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


def _network():
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", CLASSES, 32, HALF, HALF, WIDTH, "cifar"))
    model(torch.rand(8, 3, 32, 32))  # batch norms get statistics of their own
    return model.eval()


NETWORK = _network()
BODY = NETWORK.backbone.state_dict()
WHOLE = BODY | {f"fc.{name}": tensor for name, tensor in NETWORK.head.state_dict().items()}
OTHER = {name: tensor + 1 for name, tensor in BODY.items()}  # what must not be taken


def _under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def _numbered(state):
    """`nn.Sequential` of a ResNet's children without the pooling, as SimCLR codes for CIFAR."""
    tops = {name: name.split(".")[0] for name in state}
    return {name.replace(tops[name], str(NUMBERS[tops[name]]), 1): t for name, t in state.items()}


def _head(name):
    return {f"{name}.{key}": tensor for key, tensor in NETWORK.head.state_dict().items()}


def _twice(taken, other):
    return f"the network is there more than once, and that of {taken} is taken, not that of {other}"


def _alone(count, names):
    return f"{count} tensors under {names} serve training alone and are left out"


def _projection(count, name):
    told = "are a head of several layers (a projection) and are left out"
    return f"{count} tensors under {name} {told}"


N = len(BODY)
# (what is saved, what is told)
WITH_HEAD = {
    "plain": (WHOLE, None),
    **{
        prefix: (_under(prefix, WHOLE), None)
        for prefix in (
            *("module.", "model.", "backbone.", "net.", "resnet.", "student.", "encoder."),
            *("_orig_mod.", "model._orig_mod.", "_orig_mod.module.", "module._orig_mod."),
            *("1.", "attacker.model.", "any.name.that.nobody.knows."),
        )
    },
    "nest net": ({"net": WHOLE, "acc": 95.0, "epoch": 1}, None),
    "nest state": ({"state": WHOLE}, None),
    "nest in nests": ({"a": {"b": {"c": _under("d.", WHOLE)}}}, None),
    "list": ([WHOLE, OPTIMIZER, 7], None),
    "beside an optimizer": ({"optimizer": OPTIMIZER, "model": WHOLE, "epoch": 3}, None),
    "WaNet": (
        {"netC": WHOLE, "optimizerC": OPTIMIZER, "netG": None, "noise_grid": torch.rand(1, 4)},
        None,
    ),
    "BackdoorBench": (
        {"model_name": "resnet18", "model": WHOLE, "bd_train": {"x": torch.ones(3, 3, 8, 8)}},
        None,
    ),
    "mmpretrain": (
        {"state_dict": _under("backbone.", BODY) | _head("head.fc"), "meta": {"CLASSES": ["a"]}},
        None,
    ),
    "classifier behind a dropout": (BODY | _head("fc.1"), None),
    "classifier": (_under("backbone.", BODY) | _head("classifier"), None),
    "classifier.1": (_under("backbone.", BODY) | _head("classifier.1"), None),
    "kuangliu": (
        {k.replace("downsample", "shortcut"): v for k, v in BODY.items()} | _head("linear"),
        None,
    ),
    "module in the middle": (
        {k.replace("layer1.", "layer1.module."): v for k, v in WHOLE.items()},
        None,
    ),
    "EMA beside": (
        {"state_dict_ema": _under("module.", OTHER) | _head("fc"), "state_dict": WHOLE},
        _twice("state_dict", "state_dict_ema.module"),
    ),
    "EMA first": (
        {"model_ema": OTHER, "model": _under("module.", WHOLE)},
        _twice("model.module", "model_ema"),
    ),
    "EMA alone": ({"state_dict_ema": _under("module.", WHOLE), "epoch": 3}, None),
    "robustness": (
        {
            "model": _under("module.attacker.model.", OTHER)
            | _under("module.model.", WHOLE)
            | {"module.attacker.normalize.new_mean": torch.ones(3, 1, 1)}
        },
        f"{_twice('model.module.model', 'model.module.attacker.model')}; "
        f"{_alone(N + 1, 'attacker')}",
    ),
    "float16": ({k: v.half() if v.is_floating_point() else v for k, v in WHOLE.items()}, None),
    "bfloat16": ({k: v.bfloat16() if v.is_floating_point() else v for k, v in WHOLE.items()}, None),
    "float64": ({k: v.double() if v.is_floating_point() else v for k, v in WHOLE.items()}, None),
}
WITHOUT_HEAD = {
    "leftthomas": (_under("f.", _numbered(BODY)) | _under("g.", MLP), _projection(3, "g")),
    "BadEncoder": (
        {"state_dict": _under("f.f.", _numbered(BODY)) | _under("g.", MLP), "optimizer": OPTIMIZER},
        _projection(3, "g"),
    ),
    "sthalles": (
        {"state_dict": _under("backbone.", BODY | _under("fc.", MLP))},
        _projection(3, "fc"),
    ),
    "SupContrast": (
        {"opt": None, "model": _under("encoder.module.", BODY) | _under("head.", MLP)},
        _projection(3, "head"),
    ),
    "MoCo v1": (
        _under("module.encoder_q.", WHOLE) | _under("module.encoder_k.", OTHER),
        f"{_twice('module.encoder_q', 'module.encoder_k')}; "
        f"{_alone(N + 2, 'encoder_k, module.encoder_q.fc')}",
    ),
    "MoCo, key first": (
        _under("encoder_k.", OTHER) | _under("encoder_q.", BODY) | {"queue": torch.ones(8, 4)},
        f"{_twice('encoder_q', 'encoder_k')}; {_alone(N + 1, 'encoder_k, queue')}",
    ),
    "SimSiam": (
        {
            "state_dict": _under("module.encoder.", BODY | _under("fc.", MLP))
            | _under("module.predictor.", MLP)
        },
        f"{_alone(3, 'predictor')}; {_projection(3, 'fc')}",
    ),
    "BYOL": (
        {
            "state_dict": _under("target_network.encoder.", OTHER)
            | _under("online_network.encoder.", BODY)
        },
        f"{_twice('state_dict.online_network.encoder', 'state_dict.target_network.encoder')}; "
        f"{_alone(N, 'target_network')}",
    ),
    "CMC": (
        _under("module.encoder1.", BODY) | _under("module.encoder2.", OTHER),
        f"{_twice('module.encoder1', 'module.encoder2')}; {_alone(N, 'encoder2')}",
    ),
    "DINO": (
        {
            "teacher": _under("backbone.", OTHER) | _under("head.mlp.", MLP),
            "student": _under("module.backbone.", BODY) | _under("module.head.mlp.", MLP),
        },
        f"{_twice('student.module.backbone', 'teacher.backbone')}; {_projection(3, 'head')}",
    ),
    "SwAV": (
        _under("module.", BODY) | _under("module.projection_head.", MLP),
        _alone(3, "projection_head"),
    ),
    "ContrastiveCrop": (
        {"optimizer_state": OPTIMIZER, "simclr_state": _under("module.", BODY)},
        None,
    ),
    "VISSL": (
        {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": _under("base_model._feature_blocks.", BODY), "heads": {}}
                }
            }
        },
        None,
    ),
    "Barlow Twins": (
        _under("module.backbone.", BODY)
        | _under("module.projector.", MLP)
        | {"module.bn.running_mean": torch.ones(4)},
        _alone(4, "bn, projector"),
    ),
    "a hidden layer before the classes": (BODY | _under("fc.", MLP), _projection(3, "fc")),
}


def _load(content, path):
    """The network of a file, and what is told of it."""
    torch.save(content, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(path, arch="resnet18", width=WIDTH)
    told = [str(each.message) for each in caught]
    assert all(text.startswith(f"{path}: ") and text.endswith(".") for text in told)
    return model, [text.removeprefix(f"{path}: ").removesuffix(".") for text in told]


def _assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=0.01, atol=1e-6), name


@pytest.mark.parametrize("layout", sorted(WITH_HEAD))
def test_backbone_and_head_are_found(layout, tmp_path):
    content, expected = WITH_HEAD[layout]
    model, told = _load(content, tmp_path / "x.pth")
    assert told == ([] if expected is None else [expected])
    _assert_equal(model.backbone.state_dict(), BODY)
    _assert_equal(model.head.state_dict(), NETWORK.head.state_dict())


@pytest.mark.parametrize("layout", sorted(WITHOUT_HEAD))
def test_the_backbone_is_found_and_a_projection_is_no_classifier(layout, tmp_path):
    content, expected = WITHOUT_HEAD[layout]
    model, told = _load(content, tmp_path / "x.pth")
    assert told == ([] if expected is None else [expected])
    _assert_equal(model.backbone.state_dict(), BODY)
    assert model.head is None


@pytest.mark.parametrize(
    ("mean", "std"),
    [("0.mean", "0.std"), ("0.new_mean", "0.new_std"), ("normalizer.mean", "normalizer.std")],
)
def test_mean_and_std_of_a_layer_before_the_network_are_taken(mean, std, tmp_path):
    numbers = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    content = {mean: numbers, std: numbers * 2} | _under("1.", WHOLE)
    model, told = _load(content, tmp_path / "x.pth")
    assert told == []
    assert model.info.mean == pytest.approx((0.1, 0.2, 0.3))
    assert model.info.std == pytest.approx((0.2, 0.4, 0.6))


@pytest.mark.parametrize("prefix", ["0.", "2."])
def test_mean_and_std_of_a_file_win_over_those_of_the_images(prefix, tmp_path):
    numbers = torch.tensor([0.1, 0.2, 0.3])
    layer = {f"{prefix}mean": numbers, f"{prefix}std": numbers} if prefix == "0." else {}
    path = str(tmp_path / "x.pth")
    torch.save(layer | _under("1.", WHOLE), path)
    source = WeightsSource(path, "resnet18", WIDTH, 32, HALF, HALF)
    started = start_from(
        ImageFacts(CLASSES, 32, HALF, HALF), CLASSES, "resnet18", WIDTH, None, path
    )
    for model in (source.load(), started):
        assert model.info.mean == pytest.approx((0.1, 0.2, 0.3) if layer else HALF)
    with pytest.raises(ConfigError, match=r"mean=\(0\.5.*holds") if layer else nullcontext():
        load_model(path, arch="resnet18", width=WIDTH, mean=HALF)


def test_mean_and_std_in_other_units_are_not_taken(tmp_path):
    numbers = torch.tensor([125.0, 123.0, 114.0])
    with pytest.raises(WeightsError, match=r"2 unexpected \(0\.mean, 0\.std\)"):
        _load({"0.mean": numbers, "0.std": numbers} | _under("1.", WHOLE), tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", FACTORS.values(), ids=FACTORS)
def test_factors_of_weights_are_multiplied_out(wrap, tmp_path):
    network = _network().backbone
    before = network.layer2[0].conv1.weight.detach().clone()
    wrap(network.layer2[0].conv1)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network((x - 0.5) / 0.5)
        model, told = _load(network.state_dict(), tmp_path / "x.pth")
        model.normalize.mean.fill_(0.5), model.normalize.std.fill_(0.5)
        assert torch.allclose(model.eval().features(x), expected, atol=1e-5)
    assert told == []
    changed = not torch.allclose(model.backbone.layer2[0].conv1.weight, before, atol=1e-5)
    assert changed == ("weight_norm" not in str(getattr(wrap, "__name__", wrap)))


@pytest.mark.parametrize(
    ("odd", "names"),
    [
        (
            {"fc.weight_orig": torch.ones(3, 4), "fc.weight_mask": torch.ones(3, 5)},
            "fc.weight_orig",
        ),
        ({"x.weight_g": torch.ones(2), "x.weight_v": torch.ones(3, 4)}, "x.weight_g"),
        ({"bn1.neuron_mask": torch.ones(WIDTH)}, "bn1.neuron_mask"),
        ({"layer5.0.conv1.weight": torch.ones(3, FEATURES, 1, 1)}, "layer5.0.conv1.weight"),
        ({"fc.weight": torch.ones(3, FEATURES + 1), "fc.bias": torch.ones(3)}, "fc.weight"),
        (
            {"layer4.2.0.weight": torch.ones(3, FEATURES), "layer4.2.1.bias": torch.ones(3)},
            "layer4",
        ),
    ],
)
def test_what_has_no_place_is_reported(odd, names, tmp_path):
    with pytest.raises(WeightsError, match=rf"unexpected \({names}"):
        _load(BODY | odd, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (_under("encoder.", BODY) | {"backbone.conv1.weight": BODY["conv1.weight"] * 0}, "conv1"),
        (WHOLE | {"head.weight": torch.zeros(CLASSES, FEATURES)}, "head.weight"),
        (WHOLE | {"head.bias": torch.zeros(CLASSES)}, "head.bias"),
        (WHOLE | {"normalize.mean": torch.tensor([123.7, 116.3, 103.5])}, "normalize.mean"),
        (
            WHOLE
            | {
                "normalize.mean": torch.tensor([123.7, 116.3, 103.5]),
                "normalize.std": torch.tensor([58.4, 57.1, 57.4]),
            },
            "normalize.mean",
        ),
    ],
    ids=["backbone", "head", "bias", "mean", "mean and std of 255"],
)
def test_what_lies_beside_the_network_never_takes_the_place_of_a_part(state, name, tmp_path):
    with pytest.raises(WeightsError, match=rf"unexpected \(\S*{name}\S* beside the network"):
        _load(state, tmp_path / "x.pth")


def test_the_counter_of_averaged_weights_is_left_out(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(_network().backbone)
    model, told = _load(averaged.state_dict(), tmp_path / "x.pth")
    assert "n_averaged serves training alone" in told[0]
    assert torch.equal(model.backbone.conv1.weight, BODY["conv1.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_every_tensor_may_be_of_another_precision(dtype, tmp_path):
    cast = {name: tensor.to(dtype) for name, tensor in WHOLE.items()}
    model, told = _load(cast, tmp_path / "x.pth")
    assert told == []
    counter = model.backbone.bn1.num_batches_tracked
    assert (counter.dtype, counter.item()) == (torch.int64, 1)
    weight = model.backbone.conv1.weight
    assert torch.equal(weight, BODY["conv1.weight"].to(dtype).float())


def test_factors_of_other_types_are_no_traceback(tmp_path):
    network = _network().backbone
    spectral_norm(network.layer2[0].conv1)
    state = network.state_dict()
    odd = {name: t.double() if name.endswith(("_u", "_v")) else t for name, t in state.items()}
    model, _ = _load(odd, tmp_path / "x.pth")
    usual, _ = _load(state, tmp_path / "y.pth")
    ours, theirs = (each.backbone.layer2[0].conv1.weight for each in (model, usual))
    assert torch.allclose(ours, theirs, atol=1e-6)
    whole = {"x.weight_g": torch.ones(2, 1), "x.weight_v": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(WeightsError, match=r"unexpected \(x\.weight_g"):
        _load(BODY | whole, tmp_path / "z.pth")


def test_factors_never_make_more_than_the_file_has(tmp_path):
    large = torch.ones(1000, 100)
    names = [f"x{number}.weight" for number in range(50)]
    found = {f"{name}{end}": large for name in names for end in ("_orig", "_mask")}
    made = multiplied_out(found)
    assert sum(name in made for name in names) == 1


def test_numbers_of_a_network_with_pooling_do_not_fit_one_without(tmp_path):
    """At the stem for large images a file without the pooling is another network."""
    torch.manual_seed(0)
    body = build(ModelInfo("resnet18", None, 32, HALF, HALF, WIDTH, "imagenet")).backbone
    torch.save(_under("f.", _numbered(body.state_dict())), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="missing"):
        load_model(tmp_path / "x.pth", arch="resnet18", width=WIDTH, stem="imagenet")


def _assert_same_answers(theirs, arch, size, path):
    """Their plain file, ours from it, and ours from our own file answer the same."""
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # biases of classifiers are all zero before training
                parameter.add_(torch.rand_like(parameter) * 0.1)
    torch.save(theirs.state_dict(), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(path, arch=arch, input_size=size, mean=HALF, std=HALF).eval()
    save_model(model, path.with_suffix(".safetensors"))
    again = load_model(path.with_suffix(".safetensors")).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = theirs((x - 0.5) / 0.5)
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.equal(again(x), model(x))
    assert model.head.out_features == 6
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("arch", "size", "features"),
    [
        ("deit_tiny_distilled_patch16_224", 32, 2 * 192),  # a second classifier, of a second token
        ("efficientvit_m0", 64, 192),  # batch norm before the classifier
        ("dla46x_c", 32, 256),  # the classifier is a convolution
    ],
)
def test_networks_of_timm_whose_classifiers_are_unusual(arch, size, features, tmp_path):
    settings = timm.get_pretrained_cfg(arch)
    extra = {"img_size": size} if settings.fixed_input_size else {}
    torch.manual_seed(0)
    theirs = timm.create_model(arch, num_classes=6, **extra)
    assert _assert_same_answers(theirs, f"timm:{arch}", size, tmp_path / "x.pth") == []
    assert load_model(tmp_path / "x.safetensors").num_features == features


class _Branches(nn.Module):
    """Two branches with a classifier each, as CrossViT, or a network as VOLO."""

    def __init__(self, num_classes, names):
        super().__init__()
        self.names = names
        for size, name in zip((2, 3), names, strict=True):
            self.add_module(name, nn.Linear(size, num_classes) if num_classes else nn.Identity())

    def forward(self, x):
        first, second = (self.get_submodule(name) for name in self.names)
        return (first(x[:, :2]) + second(x[:, 2:])) / 2


def test_the_features_of_averaged_classifiers_are_put_in_a_row():
    found = find_classifiers(lambda classes: _Branches(classes, ("head", "head_dist")))
    assert (found.names, found.sizes, found.bias) == (("head", "head_dist"), (2, 3), True)
    theirs, x = _Branches(6, found.names), torch.rand(7, 5)
    state = theirs.state_dict()
    cut = found.cut_from(_Branches(1, found.names))
    assert torch.equal(cut(x), x)
    head, _ = take_head(state, Parts(cut, 5, found.names))
    assert torch.allclose(x @ head["head.weight"].T + head["head.bias"], theirs(x), atol=1e-6)


def test_classifiers_that_are_not_averaged_are_none():
    found = find_classifiers(lambda classes: _Branches(classes, ("head", "aux_head")))
    assert (found.names, found.is_more) == ((), False)


def test_mnasnet_is_read_with_its_version(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.mnasnet0_5(num_classes=6)
    assert _assert_same_answers(theirs, "torchvision:mnasnet0_5", 32, tmp_path / "x.pth") == []


@pytest.mark.parametrize(
    ("arch", "auxiliary"), [("googlenet", ("aux1", "aux2")), ("inception_v3", ("AuxLogits",))]
)
def test_auxiliary_classifiers_are_left_out(arch, auxiliary):
    with torch.device("meta"):
        extra = {"init_weights": False, "aux_logits": True}
        theirs = torchvision.models.get_model(arch, weights=None, **extra).state_dict()
        parts = make_parts(ModelInfo(f"torchvision:{arch}", None, 96, HALF, HALF), 1)
    rest = {name: t for name, t in theirs.items() if name not in parts.backbone.state_dict()}
    taken = take_training_only(rest, parts.auxiliary)
    assert set(taken) == set(auxiliary)
    assert rest.keys() == {"fc.weight", "fc.bias"}


def test_a_classifier_without_a_bias_gets_one_of_zeros(tmp_path):
    """torchvision's MaxViT, of which only the parts are asked: building it takes seconds."""
    parts = Parts(NETWORK.backbone, FEATURES, ("classifier.5",), bias=False)
    rest = {"classifier.5.weight": torch.ones(6, FEATURES)}
    head, classes = take_head(rest, parts)
    assert (rest, classes) == ({}, 6)
    assert torch.equal(head["head.bias"], torch.zeros(6))
