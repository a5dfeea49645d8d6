"""Names of architectures, and our own weights files."""

import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.errors import ConfigError, WeightsError
from bdclean.weights import read, write

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ARCH_FILES = sorted((Path(__file__).parents[2] / "configs" / "arch").glob("*.yaml"))


def _info(arch="resnet18", **changes):
    values = {"num_classes": 5, "input_size": 32, "mean": MEAN, "std": STD}
    if arch in ("resnet18", "resnet34", "mobilenet_v2"):
        values["width"] = 8
    return ModelInfo(arch, **{**values, **changes})


def _scrambled(info):
    """A model whose batch norms have statistics of their own."""
    model = build(info)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "full", "features"),
    [
        ("resnet18", "resnet18", 64),
        ("resnet34", "resnet34", 64),
        ("mobilenet_v2", "mobilenet_v2", 1280),
        ("shufflenet_v2_x0_5", "torchvision:shufflenet_v2_x0_5", 1024),
        ("torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_small", 1024),
        ("timm:mobilenetv3_small_050", "timm:mobilenetv3_small_050", 1024),
        ("convnext_atto", "timm:convnext_atto", 320),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", 192),
    ],
)
def test_builds_each_library(arch, full, features):
    model = build(_info(arch))
    assert model.info.arch == full
    assert model.num_features == features
    assert model.training
    assert all(module.training for module in model.modules())
    x = torch.rand(2, 3, 32, 32)
    assert model.eval().features(x).shape == (2, features)
    assert model(x).shape == (2, 5)


def test_hidden_layers_of_vgg_belong_to_the_backbone():
    with torch.device("meta"):  # shapes alone: a VGG has half a gigabyte of weights
        model = build(_info("vgg11_bn"))
    assert model.num_features == 4096
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert shapes == [(4096, 25088), (4096, 4096), (5, 4096)]


def test_mobilenet_for_small_images_ends_as_four_by_four():
    sizes = []
    for size in (32, 96):
        model = build(_info("mobilenet_v2", input_size=size))
        model.backbone.features.register_forward_hook(lambda _, __, y: sizes.append(y.shape[-1]))
        model.features(torch.rand(2, 3, size, size))
    assert sizes == [4, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet81"}, "'resnet81' is unknown. Did you mean resnet18"),
        ({"arch": "torchvision:resnet1"}, "Did you mean torchvision:resnet18, torchvision:resne"),
        ({"arch": "timm:resnet181"}, "Did you mean timm:resnet18"),
        ({"arch": "solo:resnet181"}, "Did you mean solo:resnet18"),
        ({"arch": "timm:hf-hub:timm/resnet18.a1_in1k"}, "is unknown"),
        ({"arch": "hf-hub:timm/resnet18"}, "is unknown"),
        ({"arch": "keras:resnet50"}, "is unknown"),
        ({"arch": "torchvision:squeezenet1_1"}, "linear layer"),
        ({"arch": "timm:vit_tiny_patch16_224", "input_size": 8}, "does not take input_size=8"),
        ({"arch": "torchvision:resnet18", "width": 16}, "width=16"),
        ({"arch": "timm:resnet18", "stem": "cifar"}, "stem='cifar'"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(_info(**changes))


def test_an_image_too_small_for_the_network_is_refused():
    with torch.device("meta"), pytest.raises(ConfigError, match="does not take input_size=32"):
        build(_info("torchvision:alexnet"))


@pytest.mark.parametrize(
    "arch", ["resnet18", "mobilenet_v2", "timm:convnext_atto", "torchvision:regnet_y_400mf"]
)
@pytest.mark.parametrize("num_classes", [5, None])
def test_own_file_round_trip_is_exact(tmp_path, arch, num_classes):
    path = tmp_path / "model.safetensors"
    model = _scrambled(_info(arch, num_classes=num_classes))
    digest = save_model(model, path, {"purified_by": "cbd"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path)[1]["purified_by"] == "cbd"
    loaded = load_model(path).eval()
    assert loaded.info == model.info
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.features(x), model.features(x))
    if num_classes:
        assert torch.equal(loaded(x), model(x))


def test_loading_leaves_the_global_random_state(tmp_path):
    save_model(build(_info()), tmp_path / "m.safetensors")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_that_agree_with_the_file_are_fine(tmp_path):
    save_model(build(_info()), tmp_path / "m.safetensors")
    model = load_model(
        str(tmp_path / "m.safetensors"),
        arch="resnet18",
        num_classes=5,
        input_size=32,
        mean=list(MEAN),
        std=list(STD),
        width=8,
        stem="auto",
    )
    assert model.info == build(_info()).info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet34"}, "arch='resnet34', but .* arch='resnet18'"),
        ({"num_classes": 10}, "num_classes=10, but .* num_classes=5"),
        ({"input_size": 64}, r"input_size=64, but .*=32\. Leave .* --data\.input_size 32 where"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean="),
        ({"std": (0.5, 0.5, 0.5)}, "std="),
        ({"width": 64}, "width=64"),
        ({"stem": "imagenet"}, "stem='imagenet'"),
    ],
)
def test_arguments_that_contradict_the_file_are_refused(tmp_path, changes, message):
    save_model(build(_info()), tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "m.safetensors", **changes)


def test_a_file_without_a_head_serves_any_number_of_classes(tmp_path):
    save_model(build(_info(num_classes=None)), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors", num_classes=10).head is None


def test_own_file_with_missing_and_misshaped_tensors_is_refused(tmp_path):
    model = build(_info())
    state = model.state_dict()
    del state["backbone.conv1.weight"]
    state["head.bias"] = torch.zeros(6)
    write(state, tmp_path / "m.safetensors", model.info.to_metadata())
    with pytest.raises(
        WeightsError,
        match=r"1 missing \(backbone\.conv1\.weight\); 1 misshaped \(head\.bias: .*\(6,\)",
    ):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("resnet18", {"width": 2**61}, "no resnet18 can be built with the width"),
        ("mobilenet_v2", {"width": 10**400}, "no mobilenet_v2 can be built with the width"),
        ("resnet18", {"width": 10**6}, "conv1.weight: float32 .8, 3, 3, 3. instead of .*1000000"),
        ("resnet18", {"num_classes": 10**9}, "head.weight: .* instead of float32 .1000000000, 64"),
        ("timm:vit_tiny_patch16_224", {"input_size": 10**5}, "1 misshaped .backbone.pos_embed"),
        ("torchvision:regnet_y_400mf", {"num_classes": 10**9}, "2 misshaped .head.weight"),
    ],
)
def test_a_file_that_asks_for_too_much_takes_no_memory(
    tmp_path, monkeypatch, arch, changes, message
):
    path, devices = tmp_path / "m.safetensors", set()
    model = build(_info(arch))
    metadata = model.info.to_metadata() | {key: json.dumps(n) for key, n in changes.items()}
    write(model.state_dict(), path, metadata)

    def assembled(*arguments):
        devices.add(torch.empty(0).device.type)
        return assemble(*arguments)

    module = importlib.import_module("bdclean.backbones.build")  # `build` itself is a function
    assemble = module._assemble
    monkeypatch.setattr(module, "_assemble", assembled)
    with pytest.raises(WeightsError, match=message):
        load_model(path)
    assert devices <= {"meta"}


def test_a_large_input_size_alone_takes_no_memory(tmp_path):
    """The network is not run once to measure its features: 10 ** 6 pixels are 12 terabytes."""
    model = build(_info("torchvision:shufflenet_v2_x0_5"))
    metadata = model.info.to_metadata() | {"input_size": "1000000"}
    write(model.state_dict(), tmp_path / "m.safetensors", metadata)
    assert load_model(tmp_path / "m.safetensors").num_features == 1024


def test_extra_metadata_cannot_overwrite_the_description(tmp_path):
    with pytest.raises(ConfigError, match="width"):
        save_model(build(_info()), tmp_path / "m.safetensors", {"width": "9"})


@pytest.mark.parametrize("path", ARCH_FILES, ids=lambda path: path.stem)
def test_architecture_files_hold_arch_and_width_alone_and_build(path):
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"model"}
    assert set(content["model"]) == {"init_args"}
    arguments = content["model"]["init_args"]
    assert "arch" in arguments
    assert set(arguments) <= {"arch", "width"}
    assert build(_info(**{"width": 64, **arguments})).num_features > 0


def test_there_are_architecture_files():
    names = {path.stem for path in ARCH_FILES}
    ours = {"resnet18", "resnet18_w16", "resnet34", "mobilenet_v2"}
    assert names == ours | {"preact_resnet18", "resnet20", "vgg16_cifar", "wrn16_1"}
