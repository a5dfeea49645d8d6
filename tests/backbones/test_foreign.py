"""Checkpoints of other libraries."""

import pytest
import timm
import torch
import torchvision
from lightly.models import ResNetGenerator
from lightning import Trainer
from torch import nn
from torchvision.models.resnet import BasicBlock

from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.backbones.architectures import IMAGENET_MEAN, IMAGENET_STD, usual_colours
from bdclean.backbones.head import ProbeHead
from bdclean.errors import ConfigError, WeightsError
from bdclean.purification import CBD, Projection
from bdclean.training import KNN, InputAwareTraining, LinearProbe, SimCLR
from bdclean.types import ImageFacts

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Narrow(torchvision.models.ResNet):
    """torchvision's ResNet-18 with eight channels, stem for large images."""

    def __init__(self, num_classes=7):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.inplanes = 8
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        for number, stride in enumerate((1, 2, 2, 2)):
            layer = self._make_layer(BasicBlock, 8 << number, 2, stride=stride)
            setattr(self, f"layer{number + 1}", layer)
        self.fc = nn.Linear(64, num_classes)


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    model = Narrow()
    model(torch.randn(8, 3, 64, 64))  # batch norms get statistics of their own
    return model.eval()


def _save(state, path, **metadata):
    torch.save({"state_dict": state, **metadata}, path)
    return path


def _save_run(module, path):
    """A checkpoint as our modules write it."""
    checkpoint = {"state_dict": module.state_dict(), "epoch": 3}
    module._trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def _load(path, **changes):
    values = {"arch": "resnet18", "width": 8, "stem": "imagenet", "input_size": 64}
    return load_model(path, **{**values, **changes}).eval()


def _normalised(x, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "encoder."])
def test_torchvision_to_ours_and_back_is_bit_identical(tmp_path, theirs, prefix):
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    model = _load(_save(state, tmp_path / "x.pth"))
    save_model(model, tmp_path / "ours.safetensors")
    again = load_model(tmp_path / "ours.safetensors").eval()
    with torch.no_grad():
        logits = theirs(_normalised(X))
        assert torch.equal(model(X), logits)
        assert torch.equal(again(X), logits)
    assert again.info.num_classes == 7


def test_given_mean_and_std_are_used(tmp_path, theirs):
    model = _load(_save(theirs.state_dict(), tmp_path / "x.pth"), mean=MEAN, std=STD)
    with torch.no_grad():
        assert torch.equal(model(X), theirs(_normalised(X, MEAN, STD)))


def test_solo_learn_checkpoint(tmp_path, theirs):
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    state["classifier.weight"], state["classifier.bias"] = torch.randn(9, 64), torch.randn(9)
    training = {"projector.0.weight": torch.ones(4, 64), "momentum_backbone.conv1.weight": X}
    training["queue_y"] = torch.zeros(8)  # NNCLR
    path = _save({**state, **training}, tmp_path / "x.ckpt", epoch=3)
    with pytest.warns(UserWarning, match="3 tensors under momentum_backbone, projector, queue_y"):
        model = _load(path)
    assert model.info.num_classes == 9
    assert torch.equal(model.head.weight, state["classifier.weight"])
    theirs.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(model.features(X), theirs(_normalised(X)))


def test_solo_learn_checkpoint_for_cifar(tmp_path):
    """solo/methods/base.py: a 3x3 convolution that pads by two, and no pooling."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    theirs(torch.randn(8, 3, 32, 32))
    state = {f"backbone.{k}": v for k, v in theirs.eval().state_dict().items()}
    state |= {"classifier.weight": torch.randn(9, 512), "classifier.bias": torch.randn(9)}
    path = _save({**state, "projector.0.weight": torch.ones(4, 512)}, tmp_path / "x.ckpt")
    images = X[..., :32, :32]
    with (
        pytest.warns(UserWarning, match="looks like a file of solo-learn.*name it solo:resnet18"),
        pytest.warns(UserWarning, match="1 tensor under projector"),
    ):
        other = load_model(path, arch="resnet18").eval()
    with pytest.warns(UserWarning, match="1 tensor under projector") as told:
        model = load_model(path, arch="solo:resnet18").eval()
    assert not any("solo-learn" in str(warning.message) for warning in told)
    save_model(model, tmp_path / "ours.safetensors")
    again = load_model(tmp_path / "ours.safetensors").eval()
    with torch.no_grad():
        wanted = theirs(_normalised(images))
        assert torch.equal(model.features(images), wanted)
        assert torch.equal(again.features(images), wanted)
        assert not torch.allclose(other.features(images), wanted, rtol=0.01)


def _headless(theirs, state, path):
    """What a file of `state` gives must be the features of `theirs`."""
    theirs.fc = nn.Identity()
    model = _load(_save(state, path))
    assert model.head is None
    with torch.no_grad():
        assert torch.equal(model.features(X), theirs(_normalised(X)))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_moco_checkpoint(tmp_path, theirs, version):
    """Key layouts of facebookresearch/moco (v1, v2) and moco-v3, wrapped for data parallel use."""
    student, teacher = (
        ("base_encoder", "momentum_encoder") if version == 3 else ("encoder_q", "encoder_k")
    )
    body = {k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    heads = {
        1: {"fc.weight": torch.ones(128, 64), "fc.bias": torch.ones(128)},
        2: {"fc.0.weight": torch.ones(64, 64), "fc.2.weight": torch.ones(128, 64)},
        3: {"fc.0.weight": torch.ones(9, 64), "fc.1.running_mean": torch.ones(9)},
    }[version]
    state = {f"module.{student}.{k}": v for k, v in {**body, **heads}.items()}
    state |= {f"module.{teacher}.{k}": v + 1 for k, v in {**body, **heads}.items()}
    if version == 3:
        state["module.predictor.0.weight"] = torch.ones(3)
    else:
        state |= {"module.queue": torch.ones(128, 8), "module.queue_ptr": torch.zeros(1)}
    with pytest.warns(UserWarning, match=rf"under {teacher}.*module\.{student}\.fc"):
        _headless(theirs, state, tmp_path / "x.pth.tar")


def test_lightly_checkpoint_of_a_named_backbone(tmp_path, theirs):
    """lightly's SimCLR example since 1.4: `resnet.fc = nn.Identity()`, projection beside it."""
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    state["projection_head.layers.0.weight"] = torch.ones(64, 64)
    with pytest.warns(UserWarning, match="1 tensor under projection_head"):
        _headless(theirs, state, tmp_path / "x.ckpt")


@pytest.mark.parametrize("second", ["key", "query", "student", "teacher"])
def test_lightly_checkpoint_of_its_benchmarks(tmp_path, theirs, second):
    """A classifier on the way, and for momentum methods a second network beside `backbone`."""
    body = {k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    state = {f"backbone.{k}": v for k, v in body.items()}
    state |= {f"{second}_backbone.{k}": v + 1 for k, v in body.items()}
    state[f"{second}_projection_head.layers.0.weight"] = torch.ones(64, 64)
    state["online_classifier.classification_head.weight"] = torch.ones(9, 64)
    state["criterion.center"] = torch.ones(1, 9)
    told = (
        f"under criterion, .*{second}_backbone, {second}_projection_head|under criterion, {second}"
    )
    with pytest.warns(UserWarning, match=told):
        _headless(theirs, state, tmp_path / "x.ckpt")


def test_lightly_checkpoint_of_a_numbered_backbone(tmp_path, theirs):
    """lightly's examples: `nn.Sequential(*list(resnet.children())[:-1])`, a BYOL one."""
    parts = nn.Sequential(*list(theirs.children())[:-1])
    state = {f"backbone.{k}": v for k, v in parts.state_dict().items()}
    state |= {f"backbone_momentum.{k}": v + 1 for k, v in parts.state_dict().items()}
    assert "backbone.4.0.conv1.weight" in state
    with pytest.warns(UserWarning, match="under backbone_momentum"):
        _headless(theirs, state, tmp_path / "x.ckpt")


def test_lightlys_own_resnet_numbered_is_another_network(tmp_path):
    """Taken apart, lightly's ResNet for CIFAR has lost the ReLU behind its first batch norm."""
    theirs = ResNetGenerator("resnet-18", width=1 / 8)
    parts = nn.Sequential(*list(theirs.children())[:-1])
    state = {f"backbone.{k}": v for k, v in parts.state_dict().items()}
    with pytest.raises(WeightsError, match=r"missing \(backbone\.layer"):
        _load(_save(state, tmp_path / "x.ckpt"), stem="cifar", input_size=32)


def test_without_a_classifier_the_model_has_no_head(tmp_path, theirs):
    state = {f"encoder.{k}": v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    model = _load(_save(state, tmp_path / "x.pth"), num_classes=10)
    assert model.head is None


def test_kuangliu_names(tmp_path, theirs):
    state = {
        name.replace("downsample", "shortcut").replace("fc.", "linear."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save({"net": state, "acc": 95.0, "epoch": 1}, tmp_path / "ckpt.pth")
    with torch.no_grad():
        assert torch.equal(_load(tmp_path / "ckpt.pth")(X), theirs(_normalised(X)))


def test_a_lightning_checkpoint_of_ours_brings_its_normalisation(tmp_path, theirs):
    ours = _load(_save(theirs.state_dict(), tmp_path / "x.pth"), mean=MEAN, std=STD)
    state = {f"model.{name}": tensor for name, tensor in ours.state_dict().items()}
    path = _save(state, tmp_path / "last.ckpt")
    model = _load(path)
    assert model.info.mean == pytest.approx(MEAN)
    with torch.no_grad():
        assert torch.equal(model(X), ours(X))
    with pytest.raises(ConfigError, match=r"mean=\(0\.5, 0\.5, 0\.5\), but .*holds \[0\.49"):
        _load(path, mean=(0.5, 0.5, 0.5))


def _given(theirs, path, **more):
    torch.save(theirs, path)
    facts = ImageFacts(4, 64, MEAN, STD)
    weights = {"weights": str(path), "arch": "resnet18", "width": 8, "stem": "imagenet"}
    return {"facts": facts} | weights | more


@pytest.mark.filterwarnings("ignore:.*checkpoint of an unfinished run")
@pytest.mark.parametrize("kind", ["SimCLR", "CBD"])
def test_checkpoints_of_our_runs_are_read_whole(kind, tmp_path, theirs):
    """Without the parts that served training alone, and whatever else Lightning keeps."""
    body = {k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    if kind == "SimCLR":
        module = SimCLR(**_given(body, tmp_path / "x.pth"))
    else:
        module = CBD(**_given(body, tmp_path / "x.pth"), projection=Projection("joint"), probe=None)
        module.make_networks()
        module.add_networks()
    path = _save_run(module, tmp_path / "last.ckpt")
    tops = {name.split(".")[0] for name in module.state_dict()}
    assert tops == {"model", "projection"} or tops == {"model", "projections", "teacher"}
    wanted = module.model.state_dict()
    for model in (_load(path, mean=None, std=None), load_model(path).eval()):
        assert model.info == module.model.info
        assert model.info.mean == pytest.approx(MEAN)
        assert {k: v for k, v in model.state_dict().items() if not torch.equal(v, wanted[k])} == {}


@pytest.mark.filterwarnings("ignore:.*checkpoint of an unfinished run")
@pytest.mark.parametrize("kind", ["LinearProbe", "CBD"])
def test_checkpoints_with_a_probe_head_are_read_whole(kind, tmp_path, theirs):
    method = {"CBD": CBD, "LinearProbe": LinearProbe}[kind]
    module = method(**_given(theirs.state_dict(), tmp_path / "x.pth"))
    module.make_networks()
    module.add_networks()
    module.model.head.measure_(torch.rand(20, 64))
    path = _save_run(module, tmp_path / "last.ckpt")
    model = _load(path)
    assert (model.info.head, model.info.num_classes) == ("probe", 4)
    save_model(model, tmp_path / "ours.safetensors")
    wanted = module.model.state_dict()
    for read in (model, load_model(tmp_path / "ours.safetensors")):
        state = read.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(ConfigError, match=r"num_classes=10, but .* with num_classes=4"):
        _load(path, num_classes=10)


def test_a_probe_head_of_other_features_is_reported(tmp_path, theirs):
    model = build(ModelInfo("resnet18", 4, 64, MEAN, STD, 8, "imagenet", "probe"))
    state = {f"model.backbone.{k}": v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    state |= {f"model.normalize.{k}": v for k, v in model.normalize.state_dict().items()}
    state |= {f"model.head.{k}": v for k, v in ProbeHead(9, 4).state_dict().items()}
    record = {"networks": {"model": model.info.to_metadata()}}
    with pytest.raises(WeightsError, match=r"3 misshaped \(head\.mean"):
        _load(_save(state, tmp_path / "last.ckpt", bdclean=record))


@pytest.mark.filterwarnings("ignore:.*checkpoint of an unfinished run")
def test_a_checkpoint_of_input_aware_training_is_read_without_its_trigger(tmp_path):
    module = InputAwareTraining(ImageFacts(4, 16, MEAN, STD), width=4)
    path = _save_run(module, tmp_path / "last.ckpt")
    model = load_model(path, arch="resnet18", width=4, input_size=16)
    assert model.info.mean == pytest.approx(MEAN)
    wanted = module.model.state_dict()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["CBD", "LinearProbe", "KNN"])
def test_the_stem_can_be_named(kind, tmp_path):
    """A ResNet with the stem of small images, trained at 96 pixels."""
    model = build(ModelInfo("resnet18", None, 96, MEAN, STD, width=4, stem="cifar"))
    torch.save(model.backbone.state_dict(), tmp_path / "x.pth")
    given = {"weights": str(tmp_path / "x.pth"), "arch": "resnet18", "width": 4}
    facts = ImageFacts(4, 96, MEAN, STD)
    method = {"CBD": CBD, "LinearProbe": LinearProbe, "KNN": KNN}[kind]
    with pytest.raises(WeightsError, match="stem imagenet"):
        method(facts, **given).source.load()
    loaded = method(facts, **given, stem="cifar").source.load()
    assert torch.equal(loaded.backbone.conv1.weight, model.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("arch", "size"), [("vit_tiny_patch16_224", 32), ("convnext_atto", 32), ("resnet10t", 32)]
)
def test_timm_to_ours_is_bit_identical(tmp_path, arch, size):
    extra = {"img_size": size} if arch.startswith("vit") else {}
    theirs = timm.create_model(arch, pretrained=False, num_classes=6, **extra).eval()
    path = tmp_path / "x.pth"
    torch.save({f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}, path)
    model = load_model(path, arch=f"timm:{arch}", input_size=size).eval()
    x = X[..., :size, :size]
    with torch.no_grad():
        assert torch.equal(model(x), theirs(_normalised(x, *usual_colours(f"timm:{arch}"))))


@pytest.mark.parametrize("arch", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_torchvision_families_to_ours_are_bit_identical(tmp_path, arch):
    theirs = torchvision.models.get_model(arch, weights=None, num_classes=6).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = load_model(tmp_path / "x.pth", arch=arch).eval()
    with torch.no_grad():
        assert torch.equal(model(X), theirs(_normalised(X)))


def test_num_batches_tracked_may_be_absent(tmp_path, theirs):
    state = {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}
    with torch.no_grad():
        assert torch.equal(_load(_save(state, tmp_path / "x.pth"))(X), theirs(_normalised(X)))


def test_names_that_do_not_fit_are_listed(tmp_path, theirs):
    state = theirs.state_dict()
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.ones(1)
    state["bn1.bias"] = torch.zeros(9)
    with pytest.raises(WeightsError) as caught:
        _load(_save(state, tmp_path / "x.pth"))
    message = str(caught.value)
    assert "1 missing (backbone.layer1.0.conv1.weight)" in message
    assert "1 unexpected (layer9.weight)" in message
    assert "1 misshaped (backbone.bn1.bias: float32 (9,) instead of float32 (8,))" in message


def test_a_head_without_its_bias_is_reported(tmp_path, theirs):
    state = theirs.state_dict()
    del state["fc.bias"]
    with pytest.raises(WeightsError, match=r"1 missing \(head\.bias\)"):
        _load(_save(state, tmp_path / "x.pth"))


def test_two_classifiers_are_not_merged(tmp_path, theirs):
    state = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state["fc.weight"], state["fc.bias"] = torch.zeros(7, 64), torch.zeros(7)
    with pytest.raises(WeightsError, match=r"2 unexpected \(backbone\.fc\.weight, backbone\.fc"):
        _load(_save(state, tmp_path / "x.pth"))


def test_another_architecture_is_refused(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).state_dict()
    with pytest.raises(WeightsError, match=r"missing \(backbone\..* unexpected \(cls_token"):
        _load(_save(state, tmp_path / "x.pth"))


def test_wrong_stem_is_refused_with_both_shapes(tmp_path, theirs):
    path = _save(theirs.state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"stem cifar.*\(8, 3, 7, 7\) instead of .*\(8, 3, 3, 3"):
        _load(path, stem="cifar")


def test_foreign_files_need_arch_and_the_right_number_of_classes(tmp_path, theirs):
    path = _save(theirs.state_dict() | {"more": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="name it with arch"):
        load_model(path)
    path = _save(theirs.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"num_classes=10, but the head in .* has 7"):
        _load(path, num_classes=10)


def test_half_precision_files_load_in_float32(tmp_path, theirs):
    state = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    state = {k: v.long() if "num_batches" in k else v for k, v in state.items()}
    model = _load(_save(state, tmp_path / "x.pth"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, theirs.fc.weight.half().float())


def test_a_foreign_model_builds_again_from_its_info(tmp_path, theirs):
    model = _load(_save(theirs.state_dict(), tmp_path / "x.pth"))
    assert build(model.info).state_dict().keys() == model.state_dict().keys()


HEAD = {"weight": torch.ones(7, 64), "bias": torch.zeros(7)}
BESIDE = {
    "head": (("head",), HEAD, 7),
    "classifier": (("classifier",), HEAD, 7),
    "named twice": (
        ("fc",),
        {"fc.weight": HEAD["weight"], "fc.bias": HEAD["bias"]},
        7,
    ),
    "numbered": (("linear",), {"0.weight": HEAD["weight"], "0.bias": HEAD["bias"]}, 7),
    "another name": (("probe_of_mine",), HEAD, None),
    "without a bias": (("head",), {"weight": HEAD["weight"]}, None),
    "several layers": (
        ("head",),
        {"0.weight": torch.ones(64, 64), "2.weight": HEAD["weight"]},
        None,
    ),
    "of other features": (("head",), {"weight": torch.ones(7, 65), "bias": HEAD["bias"]}, 0),
    "of training": (("projector",), HEAD, 0),
    "deeper": (("more", "head"), HEAD, 0),
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("outer", ["", "state_dict"])
def test_a_head_in_a_dict_beside_that_of_the_backbone(kind, outer, tmp_path, theirs, recwarn):
    """It becomes the head (7 classes), or is told of (None), or is none (0)."""
    keys, head, classes = BESIDE[kind]
    theirs.fc = nn.Identity()
    content = {"backbone": theirs.state_dict()}
    for key in keys[::-1]:
        head = {key: head}
    content |= head
    torch.save({outer: content} if outer else content, tmp_path / "x.pth")
    model = _load(tmp_path / "x.pth")
    told = [str(each.message) for each in recwarn if "may be a head" in str(each.message)]
    assert model.info.num_classes == (classes or None)
    assert len(told) == (classes is None)
    if classes:
        assert torch.equal(model.head.weight, HEAD["weight"])
    if told:
        where = f"{outer}.{keys[0]}".strip(".")
        assert f"what lies in {where} may be a head of this network and is not used." in told[0]


def test_a_head_beside_the_dict_of_the_backbone(tmp_path, theirs):
    theirs.fc = nn.Identity()
    head = {f"head.{name}": tensor for name, tensor in HEAD.items()}
    torch.save({"encoder": theirs.state_dict(), **head}, tmp_path / "x.pth")
    assert _load(tmp_path / "x.pth").info.num_classes == 7
