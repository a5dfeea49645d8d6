"""What is said of foreign weights of another size, width or depth than was asked for."""

import pytest
import timm
import torch
import torchvision
from hostile import in_bounds, own
from torch import nn

from bdclean.backbones import ModelInfo, build, load_model
from bdclean.backbones import skeleton as skeletons
from bdclean.errors import BdcleanError, WeightsError

pytestmark = pytest.mark.filterwarnings("ignore")
SQUARE = (0.5, 0.5, 0.5)


def _own(**values):
    return build(
        ModelInfo(**{"num_classes": 3, "input_size": 8, **values}, mean=SQUARE, std=SQUARE)
    )


def _state(**values):
    model = _own(**values)
    return {
        **model.backbone.state_dict(),
        "fc.weight": model.head.weight,
        "fc.bias": model.head.bias,
    }


def _timm(name, **options):
    return timm.create_model(name, num_classes=4, **options).state_dict()


def _theirs(name):
    return torchvision.models.get_model(name, num_classes=4).state_dict()


ASKED = {"input_size": 8, "width": 4}
# What makes the state dict, what is asked for, and how the message ends.
NEAR = {
    "deeper": (
        lambda: _state(arch="resnet34", width=4),
        {"arch": "resnet18", **ASKED},
        "It fits arch=resnet34; on the command line --model.arch resnet34.",
    ),
    "shallower": (
        lambda: _state(arch="resnet18", width=4),
        {"arch": "resnet34", **ASKED},
        "It fits arch=resnet18; on the command line --model.arch resnet18.",
    ),
    "of bottlenecks": (
        lambda: _theirs("resnet50"),
        {"arch": "resnet18"},
        "It fits arch=torchvision:resnet50; on the command line --model.arch torchvision:resnet50.",
    ),
    "of a library": (
        lambda: _theirs("shufflenet_v2_x0_5"),
        {"arch": "torchvision:shufflenet_v2_x1_0", "input_size": 32},
        "It fits arch=torchvision:shufflenet_v2_x0_5; on the command line --model.arch "
        "torchvision:shufflenet_v2_x0_5.",
    ),
    "narrower": (
        lambda: _state(arch="resnet18", width=4),
        {"arch": "resnet18", "width": 8, "input_size": 8},
        "It fits width=4; on the command line --model.width 4.",
    ),
    "narrower and deeper, inside a dictionary": (
        lambda: {"net": {f"module.{k}": v for k, v in _state(arch="resnet34", width=4).items()}},
        {"arch": "resnet18", "width": 8, "input_size": 8},
        "It fits arch=resnet34, width=4; on the command line --model.arch resnet34 "
        "--model.width 4.",
    ),
    "narrower MobileNet": (
        lambda: _state(arch="mobilenet_v2", width=16),
        {"arch": "mobilenet_v2", "width": 32, "input_size": 8},
        "It fits width=16; on the command line --model.width 16.",
    ),
    "of the usual size": (
        lambda: _timm("levit_128s"),
        {"arch": "timm:levit_128s", "input_size": 64},
        "It fits input_size=224; on the command line --data.input_size 224.",
    ),
    "of patches that the size is no multiple of": (
        lambda: _timm("eva02_tiny_patch14_224", img_size=98),
        {"arch": "timm:eva02_tiny_patch14_224", "input_size": 32},
        "It fits input_size=98; on the command line --data.input_size 98.",
    ),
    "of a size that cannot be built": (
        lambda: _timm("crossvit_tiny_240"),
        {"arch": "timm:crossvit_tiny_240", "input_size": 32},
        "Its usual input_size is 240.",
    ),
    "of nothing near": (
        lambda: {f"a{n}": torch.zeros(2) for n in range(9)},
        {"arch": "resnet18", **ASKED},
        "missing (backbone.conv1.weight, backbone.bn1.weight, ...); 9 unexpected (a0, a1, ...).",
    ),
}


@pytest.mark.parametrize("kind", NEAR)
def test_a_refusal_says_what_the_file_fits(kind, tmp_path):
    make, asked, said = NEAR[kind]
    torch.manual_seed(0)
    torch.save(make(), tmp_path / "x.pth")
    before = torch.get_rng_state()
    with pytest.raises(BdcleanError) as told:
        load_model(tmp_path / "x.pth", **asked)
    assert torch.equal(torch.get_rng_state(), before)
    message = str(told.value)
    for part in said.split("..."):
        assert part.strip(" ,") in message
    assert message.endswith(said.rpartition("...")[2])


def test_metadata_with_an_endless_input_size(tmp_path):
    """MaxViT's layers take as many calls of torch as the size squared."""
    path = tmp_path / "x.safetensors"
    own(arch='"timm:maxvit_tiny_tf_224"', width="64", stem='"imagenet"', input_size="22400")(path)
    in_bounds(path, " describes a network that takes minutes to build, more than is read of an ...")


def test_large_images_are_not_gone_through_where_layers_do_not_depend_on_them(monkeypatch):
    asked = []
    monkeypatch.setattr(skeletons, "make_parts", lambda info, _: asked.append(info.input_size))
    for arch, size in (
        ("timm:resnet18", 10**9),
        ("timm:resnet18", 64),
        ("timm:vit_tiny_patch16_224", 22400),
        ("torchvision:resnet50", 10**9),
        ("resnet18", 10**9),
    ):
        skeletons.shapes(ModelInfo(arch, None, size, SQUARE, SQUARE), "x")
    assert asked == [224, 64, 22400, 224, 10**9]


def test_what_a_network_keeps_beside_its_tensors_is_bounded():
    """Attention may look up pairs of places: the file grows with their number alone."""
    network = nn.Module()
    network.register_buffer("weight", torch.empty(2**40, device="meta"))
    skeletons.check_memory(network, "x")
    network.register_buffer("places", torch.empty(2**30, device="meta"), persistent=False)
    with pytest.raises(WeightsError, match=r"^x describes a network that takes 4\.3 GB beside its"):
        skeletons.check_memory(network, "x")
