"""A model that was changed, in the layout of the file that it came from."""

import warnings

import pytest
import timm
import torch
import torchvision
from factors import FACTORS
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from bdclean.backbones import ModelInfo, build, load_model, save_like, save_model, written_back
from bdclean.backbones.architectures import Parts
from bdclean.backbones.foreign import Source, split_foreign
from bdclean.backbones.layout import _new_biases
from bdclean.errors import ConfigError, WeightsError
from bdclean.weights import Nest

HALF = (0.5, 0.5, 0.5)
WIDTH, FEATURES, CLASSES = 4, 32, 3
NUMBERS = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
MLP = {"0.weight": torch.ones(8, FEATURES), "0.bias": torch.ones(8), "2.weight": torch.ones(4, 8)}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
MEAN = torch.tensor([0.1, 0.2, 0.3])


def _network():
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", CLASSES, 32, HALF, HALF, WIDTH, "cifar"))
    model(torch.rand(8, 3, 32, 32))  # batch norms get statistics of their own
    return model.eval()


NETWORK = _network()
BODY = NETWORK.backbone.state_dict()
WHOLE = BODY | {f"fc.{name}": tensor for name, tensor in NETWORK.head.state_dict().items()}
OTHER = {name: tensor + 1 for name, tensor in BODY.items()}  # copies


def _under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def _head(name):
    return {f"{name}.{key}": tensor for key, tensor in NETWORK.head.state_dict().items()}


def _cast(state, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def _numbered(state):
    tops = {name: name.split(".")[0] for name in state}
    return {name.replace(tops[name], str(NUMBERS[tops[name]]), 1): t for name, t in state.items()}


def _kuangliu():
    body = {k.replace("downsample", "shortcut"): v for k, v in BODY.items()}
    return body | _head("linear")


def _copy(name):
    return f"The copy of the network in {name} is left out: it has not been changed, so a backdoor"


def _beside(name):
    return f"Left out: what the file holds beside {name}, such as an optimizer"


def _parts(count, names):
    return f"Left out: {count} tensors under {names}, no part of the network."


N = len(BODY)
# name: (what is saved, keys that lead to the network, what it is without, how the notes begin)
LAYOUTS = {
    "torchvision": (WHOLE, (), (), []),
    "kuangliu": (_kuangliu(), (), (), []),
    "kuangliu, parallel, in a nest": (
        {"net": _under("module.", _kuangliu()), "acc": 95.0, "epoch": 1},
        ("net",),
        (),
        [_beside("net")],
    ),
    "Lightning": (
        {"state_dict": _under("model.", WHOLE), "epoch": 3, "optimizer_states": [OPTIMIZER]},
        ("state_dict",),
        (),
        [_beside("state_dict")],
    ),
    "compiled": (_under("_orig_mod.", WHOLE), (), (), []),
    "module in the middle": (
        {k.replace("layer1.", "layer1.module."): v for k, v in WHOLE.items()},
        (),
        (),
        [],
    ),
    "nest in nests with dots": (
        {"a.b": {"c": _under("d.", WHOLE)}},
        ("a.b", "c"),
        (),
        [_beside("a.b.c")],
    ),
    "list": ([OPTIMIZER, WHOLE, 7], (1,), (), [_beside("1")]),
    "mmpretrain": (
        {"state_dict": _under("backbone.", BODY) | _head("head.fc"), "meta": {"CLASSES": ["a"]}},
        ("state_dict",),
        (),
        [_beside("state_dict")],
    ),
    "classifier.1": (_under("backbone.", BODY) | _head("classifier.1"), (), (), []),
    "EMA beside": (
        {"state_dict_ema": _under("module.", OTHER) | _head("fc"), "state_dict": WHOLE},
        ("state_dict",),
        (),
        [_copy("state_dict_ema.module"), _beside("state_dict")],
    ),
    "robustness": (
        {"model": _under("module.attacker.model.", OTHER) | _under("module.model.", WHOLE)},
        ("model",),
        ("module.attacker.",),
        [
            _copy("model.module.attacker.model"),
            _parts(N, "attacker"),
            _beside("model"),
        ],
    ),
    "MoCo": (
        {
            "state_dict": _under("module.encoder_q.", WHOLE)
            | _under("module.encoder_k.", OTHER)
            | {"module.queue": torch.ones(8, 4)}
        },
        ("state_dict",),
        ("module.encoder_k.", "module.encoder_q.fc.", "module.queue"),
        [
            _copy("state_dict.module.encoder_k"),
            _parts(N + 3, "encoder_k, fc, queue"),
            _beside("state_dict"),
        ],
    ),
    "DINO": (
        {
            "teacher": _under("backbone.", OTHER) | _under("head.mlp.", MLP),
            "student": _under("module.backbone.", BODY) | _under("module.head.mlp.", MLP),
        },
        ("student",),
        ("module.head.",),
        [_copy("teacher.backbone"), _parts(3, "head"), _beside("student")],
    ),
    "SimSiam": (
        _under("encoder.", BODY | _under("fc.", MLP)) | _under("predictor.", MLP),
        (),
        ("encoder.fc.", "predictor."),
        [_parts(6, "fc, predictor")],
    ),
    "leftthomas": (
        _under("f.", _numbered(BODY)) | _under("g.", MLP),
        (),
        ("g.",),
        [_parts(3, "g")],
    ),
    "normalisation before it": (
        {"0.mean": MEAN.view(1, 3, 1, 1).double(), "0.std": MEAN.view(1, 3, 1, 1)}
        | _under("1.", WHOLE),
        (),
        (),
        [],
    ),
    "averaged weights": (
        AveragedModel(NETWORK.backbone).state_dict() | _head("module.fc"),
        (),
        (),
        ["n_averaged: as in the file, because the network does not use them."],
    ),
    "without counters": ({k: v for k, v in WHOLE.items() if v.ndim}, (), (), []),
    "float16": (
        _cast(WHOLE, torch.float16),
        (),
        (),
        ["Computed in float32 and rounded to the precision of the file: float16."],
    ),
    "bfloat16 with counters": (
        {k: v.bfloat16() for k, v in WHOLE.items()},
        (),
        (),
        ["Computed in float32 and rounded to the precision of the file: bfloat16."],
    ),
    "float64": (
        {k: v.double() + 1e-12 if v.ndim else v for k, v in WHOLE.items()},
        (),
        (),
        [],
    ),
    "a convolution as classifier": (
        WHOLE | {"fc.weight": WHOLE["fc.weight"].view(CLASSES, FEATURES, 1, 1)},
        (),
        (),
        ["A convolution, as in the file: fc.weight."],
    ),
    "one tensor with two names": (
        WHOLE | dict.fromkeys(("bn1.weight", "bn1.bias"), torch.ones(WIDTH)),
        (),
        (),
        [],
    ),
}
IN_METADATA = ("normalize.mean", "normalize.std")
ROUNDED = {"float16": torch.float16, "bfloat16 with counters": torch.bfloat16}


def _load(path, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(path, **{"arch": "resnet18", "width": WIDTH, **given})


@torch.no_grad()
def _change(model):
    """Other weights and statistics, as after some training."""
    for name, tensor in model.state_dict().items():
        if not name.startswith("normalize."):
            tensor.copy_(tensor * 1.5 if tensor.is_floating_point() else tensor + 3)


def _network_of(path, keys):
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    for key in keys:
        content = content[key]
    return content


def _assert_same_form(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name


@pytest.mark.parametrize(
    ("layout", "ending"),
    [
        *((layout, ".pth") for layout in LAYOUTS),
        *((layout, ".safetensors") for layout in ("torchvision", "MoCo", "list", "float16")),
    ],
)
def test_a_changed_model_goes_back_into_its_layout(layout, ending, tmp_path):
    content, keys, without, begin = LAYOUTS[layout]
    given, target = tmp_path / "given.pth", tmp_path / f"back{ending}"
    torch.save(content, given)
    original = _network_of(given, keys)
    expected = {k: v for k, v in original.items() if not k.startswith(without or ("-",))}
    model = _load(given)

    unchanged = written_back(given, model).tensors[keys]
    _assert_same_form(unchanged, expected)
    for name, tensor in expected.items():
        assert torch.equal(unchanged[name], tensor), name

    _change(model)
    digest, notes = save_like(given, model, target)
    assert len(digest) == 64
    _assert_same_form(_network_of(target, keys), expected)
    again = _load(target).state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        if tensor.ndim or layout != "without counters":
            kind = tensor.dtype if name in IN_METADATA else ROUNDED.get(layout, tensor.dtype)
            assert torch.equal(again[name], tensor.to(kind).to(tensor.dtype)), name
    if ending == ".safetensors" and keys:
        begin = [*begin, ".safetensors files have no keys around a network"]
    assert len(notes) == len(begin)
    for note, start in zip(notes, begin, strict=True):
        assert note.startswith(start)
        assert note.endswith(".")


SHARED = (
    _under("module.model.", WHOLE)
    | _under("module.attacker.model.", WHOLE)
    | {"module.normalizer.new_mean": MEAN.view(3, 1, 1), "module.normalizer.new_std": MEAN}
    | {"module.attacker.normalize.new_mean": MEAN.view(3, 1, 1) * 1}
)


def test_a_module_under_two_names_goes_back_under_both(tmp_path):
    """As the networks of github.com/MadryLab/robustness, whose attacker holds the network."""
    torch.save({"model": SHARED}, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    _change(model)
    _, (note,) = save_like(tmp_path / "x.pth", model, tmp_path / "y.pth")
    assert note.startswith(_beside("model"))
    found = torch.load(tmp_path / "y.pth", weights_only=True)["model"]
    _assert_same_form(found, SHARED)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(found[f"module.model.{name}"], tensor), name
        assert torch.equal(found[f"module.attacker.model.{name}"], tensor), name


def test_what_is_shared_in_part_is_left_out(tmp_path):
    other = {"module.attacker.model.fc.weight": WHOLE["fc.weight"] * 1}
    torch.save({"model": SHARED | other}, tmp_path / "x.pth")
    layout = written_back(tmp_path / "x.pth", _load(tmp_path / "x.pth"))
    assert not any(name.startswith("module.attacker.") for name in layout.flat())
    assert layout.notes[0].startswith(_copy("model.module.attacker.model"))


def test_layers_that_only_training_uses_stay_if_they_are_of_the_architecture():
    state = WHOLE | {"aux1.fc.weight": torch.ones(3, 4), "projector.weight": torch.ones(3, 4)}
    parts = Parts(NETWORK.backbone, FEATURES, ("fc",), auxiliary=("aux1",))
    found = split_foreign([Nest("", state)], parts, "x.pth")
    assert [place.name for place in found.kept] == ["aux1.fc.weight"]


def test_nothing_but_tensors_dicts_and_lists_is_written(tmp_path):
    torch.save({"state_dict": WHOLE, "epoch": 3, "args": "text"}, tmp_path / "x.pth")
    torch.save([OPTIMIZER, WHOLE, 7], tmp_path / "y.pth")
    model = _load(tmp_path / "x.pth")
    save_like(tmp_path / "x.pth", model, tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True).keys() == {"state_dict"}
    save_like(tmp_path / "y.pth", model, tmp_path / "y.bin")
    first, network = torch.load(tmp_path / "y.bin", weights_only=True)
    assert (first, network.keys()) == ({}, WHOLE.keys())


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"backbone": BODY, "classifier": NETWORK.head.state_dict()}, "classifier."),
        ({"model": BODY} | _head("fc"), "fc."),
        ({"a": {"backbone": BODY, "head": _head("fc")}}, "head.fc."),
    ],
    ids=["beside", "above", "beside, deeper"],
)
def test_a_classifier_in_another_dict_goes_back_there(content, names, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    _change(model)
    assert written_back(tmp_path / "x.pth", model).nested().keys() == content.keys()
    for target in ("x.pt", "x.safetensors"):
        save_like(tmp_path / "x.pth", model, tmp_path / target)
        again = _load(tmp_path / target).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again[name], tensor), name
    flat = load_file(tmp_path / "x.safetensors")
    assert flat.keys() == BODY.keys() | {f"{names}weight", f"{names}bias"}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", FACTORS.values(), ids=FACTORS)
def test_factors_go_back_as_plain_weights(wrap, tmp_path):
    network = _network().backbone
    wrap(network.layer2[0].conv1)
    torch.save({"model": _under("module.", network.state_dict())}, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    _change(model)
    _, (_, note) = save_like(tmp_path / "x.pth", model, tmp_path / "back.pth")
    assert note == (
        "The layers of module.layer2.0.conv1.weight take plain weights, without the pruning, "
        "weight norm or spectral norm that they have in the file."
    )
    plain = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert plain.keys() == _under("module.", BODY).keys()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(plain[f"module.{name}"], tensor), name


def _answers(theirs, x):
    theirs.eval()
    with torch.no_grad():
        return theirs((x - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("torchvision:resnet18", []),
        ("timm:vit_tiny_patch16_224", []),
        (
            "timm:deit_tiny_distilled_patch16_224",
            ["Their average is the classifier of the model: head, head_dist."],
        ),
        ("timm:dla46x_c", ["A convolution, as in the file: fc.weight."]),
    ],
)
def test_the_module_of_the_library_loads_it(arch, told, tmp_path):
    library, _, name = arch.partition(":")

    def create():
        if library == "torchvision":
            return torchvision.models.get_model(name, weights=None, num_classes=6)
        size = {"img_size": 32} if "patch" in name else {}
        return timm.create_model(name, num_classes=6, **size)

    torch.manual_seed(0)
    theirs = create()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # biases of classifiers are all zero before training
                parameter.add_(torch.rand_like(parameter) * 0.1)
    given, target = tmp_path / "x.pth", tmp_path / "y.safetensors"
    torch.save(theirs.state_dict(), given)
    model = load_model(given, arch=arch, input_size=32, mean=HALF, std=HALF).eval()
    kept = written_back(given, model).flat()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(kept[key], tensor), key
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    _, notes = save_like(given, model, target)
    assert list(notes) == told
    again = create()
    again.load_state_dict(load_file(target), strict=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(_answers(again, x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert not torch.allclose(_answers(theirs, x), expected, rtol=1e-2)
    reloaded = load_model(target, arch=arch, input_size=32, mean=HALF, std=HALF).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(reloaded[key], tensor), key


class _Block(nn.Module):
    def __init__(self, before, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1:
            conv = nn.Conv2d(before, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x):
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class _CifarResNet(nn.Module):
    """A ResNet-18 with the names of github.com/kuangliu/pytorch-cifar."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        before = WIDTH
        for number in range(1, 5):
            planes, stride = WIDTH << (number - 1), 1 if number == 1 else 2
            blocks = _Block(before, planes, stride), _Block(planes, planes, 1)
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = planes
        self.linear = nn.Linear(before, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


def test_a_cifar_network_in_parallel_loads_it_as_it_loaded_the_original(tmp_path):
    torch.manual_seed(0)
    theirs = nn.DataParallel(_CifarResNet())
    torch.save({"net": theirs.state_dict(), "acc": 95.0, "epoch": 1}, tmp_path / "ckpt.pth")
    model = _load(tmp_path / "ckpt.pth", mean=HALF, std=HALF).eval()
    _change(model)
    save_like(tmp_path / "ckpt.pth", model, tmp_path / "clean.pth")
    theirs.load_state_dict(torch.load(tmp_path / "clean.pth", weights_only=True)["net"])
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(_answers(theirs, x), model(x), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_other_classes_goes_under_the_names_of_the_file(tmp_path):
    torch.save(_kuangliu(), tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    model.replace_head(7)
    _, notes = save_like(tmp_path / "x.pth", model, tmp_path / "y.pth")
    assert notes == ("The classifier has 7 classes; that of the file had 3.",)
    again = _load(tmp_path / "y.pth")
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(again.head.bias, model.head.bias)


@pytest.mark.parametrize(
    ("saved", "classes", "kind", "note"),
    [
        (WHOLE, None, "linear", "The classifier of the file is left out: the model has none."),
        (
            WHOLE,
            3,
            "probe",
            "The classifier of the model (of a linear probe) is left out: the layers of the file "
            "cannot do what it does; the model's own file has it.",
        ),
        (
            BODY,
            3,
            "linear",
            "The classifier of the model (linear) is left out: the file has none; the model's own "
            "file has it.",
        ),
    ],
)
def test_a_classifier_without_a_place_is_left_out(saved, classes, kind, note, tmp_path):
    torch.save(saved, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    model.replace_head(classes, kind)
    layout = written_back(tmp_path / "x.pth", model)
    assert (layout.notes, layout.flat().keys()) == ((note,), BODY.keys())


def test_a_bias_that_the_file_lacks_is_added_if_it_is_not_zero():
    """As of torchvision's MaxViT, whose building takes seconds."""
    nest = Nest("", {"classifier.5.weight": torch.ones(CLASSES, FEATURES).half()})
    sources = {"head.weight": (Source(nest, "classifier.5.weight"),)}
    model = _network()
    ((_, name, bias),) = _new_biases(model, sources)
    assert name == "classifier.5.bias"
    assert torch.equal(bias, model.head.bias.detach().half())
    torch.nn.init.zeros_(model.head.bias)
    assert list(_new_biases(model, sources)) == []


def test_files_of_ours_keep_our_layout(tmp_path):
    save_model(_network(), tmp_path / "x.safetensors")
    model = load_model(tmp_path / "x.safetensors")
    _change(model)
    _, notes = save_like(tmp_path / "x.safetensors", model, tmp_path / "y.safetensors")
    assert notes == ()
    again = load_model(tmp_path / "y.safetensors")
    assert again.info == model.info
    assert torch.equal(again.head.weight, model.head.weight)
    _, notes = save_like(tmp_path / "x.safetensors", model, tmp_path / "y.pt")
    assert notes == ("Only .safetensors files say which architecture they are for.",)
    assert torch.equal(_load(tmp_path / "y.pt").head.weight, model.head.weight)


def test_what_cannot_be_written_is_told(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(_cast(WHOLE, torch.float16), path)
    model = _load(path)
    with pytest.raises(WeightsError, match=r"y\.npz: weights are written .* change the ending\."):
        save_like(path, model, tmp_path / "y.npz")
    with pytest.raises(ConfigError, match=r"x\.pth is the file that the model came from"):
        save_like(path, model, path)
    with pytest.raises(WeightsError, match=r"y\.pt cannot be written"):
        save_like(path, model, path / "y.pt")
    with torch.no_grad():
        model.backbone.bn1.running_var.fill_(1e6)
    with pytest.raises(WeightsError, match=r"holds bn1\.running_var as float16, which cannot"):
        save_like(path, model, tmp_path / "y.pt")
    other = build(ModelInfo("resnet34", CLASSES, 32, HALF, HALF, WIDTH, "cifar"))
    with pytest.raises(WeightsError, match=r"does not hold the network .*resnet34\): \d+ missing"):
        save_like(path, other, tmp_path / "y.pt")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.pth"]


def test_counters_that_the_precision_of_the_file_cannot_hold_stay(tmp_path):
    torch.save({name: tensor.half() for name, tensor in WHOLE.items()}, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    model.backbone.bn1.num_batches_tracked.fill_(100_000)
    counter = written_back(tmp_path / "x.pth", model).flat()["bn1.num_batches_tracked"]
    assert (counter.dtype, counter.item()) == (torch.float16, 1)


@pytest.mark.parametrize("ending", [".pth.tar", ".bin", ".th"])
def test_every_ending_of_torch_files_is_read_again(ending, tmp_path):
    torch.save(WHOLE, tmp_path / "x.pth")
    save_like(tmp_path / "x.pth", _network(), tmp_path / f"y{ending}")
    assert _network_of(tmp_path / f"y{ending}", ()).keys() == WHOLE.keys()


def test_a_model_in_half_precision_goes_back_into_single(tmp_path):
    torch.save(WHOLE, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth").half()
    for name, tensor in written_back(tmp_path / "x.pth", model).flat().items():
        assert torch.equal(tensor, WHOLE[name]), name
