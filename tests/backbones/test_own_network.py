"""Networks of the user's own, which `arch` names as MODULE:NAME."""

import copy
import json
import sys
from dataclasses import replace
from types import ModuleType

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
from bdclean.backbones.own_network import _NETWORKS, is_own_network, name_network
from bdclean.errors import ConfigError, WeightsError
from bdclean.purification.bcu import BCU
from bdclean.types import ImageFacts
from bdclean.weights import write

HALF = (0.5, 0.5, 0.5)


class Plain(nn.Module):
    """Registered in another order than it runs, with a parameter of its own."""

    def __init__(self, width=4, depth=2):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(2 * width, 7)
        sizes = [width, *[2 * width] * depth]
        self.body = nn.Sequential(*map(_step, sizes[:-1], sizes[1:]))
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.spare = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        x = self.bn1(self.conv1(x * self.scale)).relu()
        return self.fc(self.body(x).mean((2, 3)))


def _step(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class Branching(Plain):
    """No trace can follow it."""

    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


class Hooked(Plain):
    """A trace would not see what its hook does."""

    def __init__(self):
        super().__init__()
        self.bn1.register_forward_hook(lambda _, __, output: 2 * output)


class Normed(Plain):
    """One of its layers computes its weight."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv1)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Plain()

    def forward(self, x):
        return self.net(x)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 4, 8))
        self.patch = nn.Conv2d(3, 8, 16, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7, bias=False)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2))
        self.fc = nn.LazyLinear(7)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def made(width=4):
    """A function rather than a class."""
    return Plain(width, depth=3)


class Pair(Plain):
    def forward(self, x):
        return super().forward(x), x


class Soft(Plain):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Average(Plain):
    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(8, 7)

    def forward(self, x):
        x = self.body(self.bn1(self.conv1(x))).mean((2, 3))
        return (self.fc(x) + self.fc2(x)) / 2


class Maps(Plain):
    def forward(self, x):
        return self.conv1(x)


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 32)

    def forward(self, x):
        return self.conv(x).flatten(1)


class Uncopied(Plain):
    def __deepcopy__(self, memo):
        raise TypeError("not me")


class Sure(Plain):
    def __init__(self, width):
        if width > 100:
            raise ValueError(f"width {width}?")
        super().__init__(width)


ready = nn.Linear(3, 3)
number = 3


def text():
    return "a network"


HERE = __name__
GOOD = ("Plain", "Plain(width=8)@fc", "Branching", "Hooked", "Normed", "Wrapped", "Tokens", "Lazy")
GOOD = (*GOOD, "made(8)")


def _arch(name):
    return f"{HERE}:{name}"


def _info(name, num_classes=5):
    return ModelInfo(_arch(name), num_classes, 32, HALF, HALF)


@pytest.fixture(params=GOOD)
def model(request):
    torch.manual_seed(0)
    return build(_info(request.param)).eval()


@pytest.mark.parametrize(
    ("arch", "own"),
    [
        ("mine:Net", True),
        ("a.b.c:Net(depth=3)@body.fc", True),
        ("mine:Net(text='a:b@c')", True),
        ("timm:resnet18", False),
        ("torchvision:resnet18", False),
        ("solo:resnet18", False),
        ("resnet18", False),
        ("mine.Net", False),
        ("hf-hub:timm/resnet18", False),
        ("timm:hf_hub:evil", False),
        ("mine:Net(depth=3", False),
    ],
)
def test_the_form_of_a_name(arch, own):
    assert is_own_network(arch) == own


# ---------------------------------------------------------------------- what works


def test_features_and_logits_are_those_of_the_network(model):
    x = torch.rand(2, 3, 32, 32)
    assert model(x).shape == (2, 5)
    assert model.features(x).shape == (2, model.num_features)
    assert model.info.arch.startswith(f"{HERE}:")


def test_the_head_is_the_layer_that_gives_the_answer():
    model = build(_info("Plain", num_classes=7)).eval()
    whole = Plain().eval()
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")}
    model.backbone.load_state_dict(state)
    model.head.load_state_dict(whole.fc.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), whole(model.normalize(x)))


def test_an_own_file_loads_where_the_network_is_named(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", arch=model.info.arch).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded.info == model.info


@pytest.mark.parametrize("kind", [Plain, Wrapped, Tokens])
def test_a_state_dict_of_the_whole_network_loads_and_is_written_back(kind, tmp_path):
    whole = kind().eval()
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "net.pth")
    loaded = load_model(tmp_path / "net.pth", arch=_arch(kind.__name__), mean=HALF, std=HALF).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), whole(loaded.normalize(x)))
    save_like(tmp_path / "net.pth", loaded, tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth")["state_dict"]
    assert again.keys() == whole.state_dict().keys()
    kind().load_state_dict(again)


def test_folded_features_are_the_same(model):
    x = torch.rand(2, 3, 32, 32)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    folded = frozen_copy(model)
    kind = type(model.backbone).__name__
    assert bool(folded.folded) == (kind in ("Plain", "Wrapped"))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.features(x), rtol=1e-4, atol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        folded.refresh_(model)
        torch.testing.assert_close(folded(x), model.features(x), rtol=1e-4, atol=1e-5)


BLOCKS = {
    "Plain": [("stem", 0), ("body.0.0", 1), ("body.1.0", 2), ("head", 3)],
    "Wrapped": [("stem", 0), ("net.body.0.0", 1), ("net.body.1.0", 2), ("head", 3)],
    "Tokens": [("stem", 0), ("blocks.0", 1), ("blocks.1", 2), ("head", 3)],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_in_the_order_of_the_forward_pass(name):
    model = build(_info(name)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    blocks = ordered_blocks(model)
    assert [(block.name, block.group) for block in blocks] == BLOCKS[name]
    covered = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert sorted(covered) == sorted(map(id, model.parameters()))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_bcu_draws_its_deep_blocks_anew(model):
    student = BCU(ImageFacts(5, 32, HALF, HALF)).make_student(model.copy())
    old, new = (ordered_blocks(each)[-2] for each in (model, student))
    pairs = list(zip(old.parameters(), new.parameters(), strict=True))
    assert sum(int((a != b).sum()) for a, b in pairs) > 0.1 * sum(a.numel() for a, _ in pairs)
    assert student(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_it_can_be_copied(model):
    other = copy.deepcopy(model)
    assert not {p.data_ptr() for p in other.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


# ---------------------------------------------------------------------- no file makes code run


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that tells of its import, on the path; gives the file that it would write."""
    (tmp_path / "canary_net.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom {HERE} import Plain as Net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "ran"
    sys.modules.pop("canary_net", None)
    for arch in [each for each in _NETWORKS if each.startswith("canary_net")]:
        del _NETWORKS[arch]


def _canary_file(tmp_path, arch="canary_net:Net"):
    model = build(_info("Plain"))
    info = replace(model.info, arch=arch)
    write(model.state_dict(), tmp_path / "m.safetensors", info.to_metadata())
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("arch", ["canary_net:Net", "canary_net:Net(width=4)@fc", "os:getcwd"])
def test_a_file_that_names_code_is_refused_without_importing_it(tmp_path, canary, arch):
    path = _canary_file(tmp_path, arch)
    with pytest.raises(ConfigError, match=r"somebody's own \(\w+:\w+\), and no file makes bdclean"):
        load_model(path)
    assert not canary.exists()
    with pytest.raises(ConfigError, match="no file makes bdclean import code: name the module"):
        load_model(path, arch="resnet18")
    assert not canary.exists()


def test_the_module_that_is_named_counts_and_not_that_of_the_file(tmp_path, canary):
    path = _canary_file(tmp_path)
    assert load_model(path, arch=_arch("Plain")).info.arch == _arch("Plain")
    assert not canary.exists()
    assert load_model(path, arch="canary_net:Net").info.arch == "canary_net:Net"
    assert canary.exists()


def test_a_checkpoint_that_names_code_does_not_import_it(canary):
    from bdclean.modules.restored import networks_of

    model = build(_info("Plain"))
    info = replace(model.info, arch="canary_net:Net")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="canary_net:Net is code of somebody's own, and no"):
        networks_of({"networks": {"model": info.to_metadata()}}, state)
    assert not canary.exists()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("nowhere:Net", "arch='nowhere:Net' is unknown: there is no module nowhere, neither"),
        (_arch("Nothing"), "has no Nothing; name a class or function"),
        (_arch("number"), "number is of the type int; name a class or function"),
        (_arch("ready"), "ready is a network that has been made already"),
        (_arch("text"), "it gives a str; it must give a torch.nn.Module"),
        (_arch("Sure"), "missing a required argument: 'width'; arguments stand in brackets"),
        (_arch("Sure(deep=3)"), "argument: 'width'; arguments stand in brackets"),
        (_arch("Sure(width=101)"), "making it raised ValueError: width 101"),
        (_arch("Sure(width=open)"), "arguments must be plain values"),
        (_arch("Sure(4)(5)"), "arguments must be plain values"),
        (_arch("Plain@conv1"), "no linear layer conv1; there are fc, spare"),
        (_arch("Plain@spare"), "not what its linear layer spare gives"),
        (_arch("Pair"), "its output for two images is a tuple; it must be one tensor of logits"),
        (_arch("Maps"), r"two images has the shape \(2, 4, 32, 32\)"),
        (_arch("Soft"), "not what one of its linear layers gives .there are fc, spare.; it must"),
        (_arch("Average"), "the logits of one head as they are, without softmax or an average"),
        (_arch("Headless"), "no linear layer within, so it has no head"),
        (_arch("Uncopied"), "cannot be copied by copy.deepcopy .not me., and methods need"),
        (_arch("Plain(depth=9)"), r"does not take images of shape \(2, 3, 32, 32\)"),
        (_arch(f"Plain({' ' * 500})"), "characters, and 400 are allowed"),
    ],
)
def test_what_is_no_network_is_refused(arch, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelInfo(arch, 5, 32, HALF, HALF))


def test_what_a_module_sets_for_all_of_torch_is_undone(monkeypatch, tmp_path):
    (tmp_path / "rude_net.py").write_text(
        "import torch\n"
        "torch.manual_seed(5)\n"
        "torch.set_grad_enabled(False)\n"
        "torch.set_default_dtype(torch.float64)\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.set_grad_enabled(False)\n"
        "        self.fc = torch.nn.Linear(3, 5)\n"
        "    def forward(self, x):\n"
        "        return self.fc(x.sub_(1).mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    name_network("rude_net:Net")
    assert torch.equal(torch.rand(1), expected)
    model = build(ModelInfo("rude_net:Net", 5, 32, HALF, HALF))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_a_module_whose_import_fails_is_told(monkeypatch, tmp_path):
    (tmp_path / "failing_net.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="import of failing_net raised ModuleNotFoundError: No m"):
        build(ModelInfo("failing_net:Net", 5, 32, HALF, HALF))


def test_width_and_stem_are_not_of_a_network_of_ones_own():
    with pytest.raises(ConfigError, match="width=16: only resnet18"):
        build(replace(_info("Plain"), width=16))


def test_weights_of_another_network_do_not_fit(tmp_path):
    save_model(build(_info("Plain")), tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit .*Plain\(width=8\)"):
        load_model(tmp_path / "m.safetensors", arch=_arch("Plain(width=8)"))


def test_a_network_without_convolutions_has_no_order(monkeypatch):
    module = ModuleType("flat_net")
    module.Net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    monkeypatch.setitem(sys.modules, "flat_net", module)
    model = build(ModelInfo("flat_net:Net", 5, 32, HALF, HALF))
    assert F.softmax(model(torch.rand(2, 3, 32, 32)), 1).shape == (2, 5)
    with pytest.raises(ConfigError, match="The order of blocks of Sequential is not known"):
        ordered_blocks(model)
    _NETWORKS.pop("flat_net:Net")


def test_the_file_records_the_whole_name(tmp_path):
    model = build(_info("Plain(width=8)@fc"))
    assert json.loads(model.info.to_metadata()["arch"]) == _arch("Plain(width=8)@fc")
