"""The order of stages, for each family."""

import itertools

import pytest
import timm
import torch
import torchvision
from torch import nn

from bdclean.backbones import ModelInfo, SplitModel, build, ordered_blocks
from bdclean.errors import ConfigError

HALF = (0.5, 0.5, 0.5)


def _split(network, features=16, num_classes=3):
    info = ModelInfo("resnet18", num_classes, 32, HALF, HALF)
    return SplitModel(network, features, num_classes, HALF, HALF, info)


def _own(arch, num_classes=3):
    width = 8 if arch in ("resnet18", "resnet34", "mobilenet_v2") else 64
    return build(ModelInfo(arch, num_classes, 32, HALF, HALF, width=width))


def _vit():
    network = torchvision.models.VisionTransformer(32, 16, 3, 2, 24, 48)
    network.heads = nn.Identity()
    return _split(network)


def _small_vgg(batch_norm):
    table = [4, "M", 8, "M", 16, 16, "M", 16, 16, "M"]
    with torch.device("meta"):  # its hidden layers are large; small ones replace them
        network = torchvision.models.VGG(nn.Identity(), init_weights=False)
    network.features = torchvision.models.vgg.make_layers(table, batch_norm=batch_norm)
    network.classifier[0] = nn.Linear(16 * 49, 32)
    network.classifier[3] = nn.Linear(32, 32)
    network.classifier[6] = nn.Identity()
    return _split(network)


def _timm(name, **arguments):
    return _split(timm.create_model(name, num_classes=0, **arguments))


def _timm_vgg():
    table = [4, "M", 8, "M", 16, 16, "M"]
    with torch.device("meta"):
        network = timm.models.vgg.VGG(table, num_classes=0, norm_layer=nn.BatchNorm2d)
    network.features.to_empty(device="cpu")
    network.pre_logits = timm.models.vgg.ConvMlp(16, 32, 7)
    return _split(network)


def _densenet(kind):
    network = kind(growth_rate=4, block_config=(1, 2))
    network.classifier = nn.Identity()
    return _split(network)


def _swin():
    network = torchvision.models.SwinTransformer([4, 4], 24, [1, 2], [1, 2], [4, 4])
    network.head = nn.Identity()
    return _split(network, 48)


MODELS = {
    "resnet18": lambda: _own("resnet18"),
    "resnet34": lambda: _own("resnet34"),
    "torchvision resnet18": lambda: _own("torchvision:resnet18"),
    "timm resnet10t": lambda: _timm("resnet10t"),
    "timm resnet14t": lambda: _timm("resnet14t"),
    "mobilenet_v2": lambda: _own("mobilenet_v2"),
    "timm mobilenetv2": lambda: _timm("mobilenetv2_035"),
    "vgg": lambda: _small_vgg(batch_norm=False),
    "vgg_bn": lambda: _small_vgg(batch_norm=True),
    "timm vgg_bn": _timm_vgg,
    "efficientnet": lambda: _own("torchvision:efficientnet_b0"),
    "timm efficientnet": lambda: _timm("efficientnet_lite0"),
    "vit": _vit,
    "timm vit": lambda: _timm("vit_tiny_patch16_224", depth=3, img_size=32),
    "timm vit with registers": lambda: _timm(
        "vit_tiny_patch16_224", depth=2, img_size=32, reg_tokens=2, global_pool="avg"
    ),
    "convnext": lambda: _split(
        torchvision.models.ConvNeXt(
            [
                torchvision.models.convnext.CNBlockConfig(8, 16, 2),
                torchvision.models.convnext.CNBlockConfig(16, None, 2),
            ]
        )
    ),
    "timm convnext": lambda: _timm("convnext_atto"),
    "mobilenet_v3": lambda: _own("torchvision:mobilenet_v3_small"),
    "timm mobilenetv3": lambda: _timm("mobilenetv3_small_050"),
    "regnet": lambda: _own("torchvision:regnet_x_400mf"),
    "timm regnet": lambda: _timm("regnetx_002"),
    "densenet": lambda: _densenet(torchvision.models.DenseNet),
    "timm densenet": lambda: _densenet(timm.models.densenet.DenseNet),
    "swin": _swin,
    "timm swin": lambda: _timm(
        "swin_tiny_patch4_window7_224",
        depths=(1, 2),
        embed_dim=24,
        num_heads=(1, 2),
        img_size=32,
        window_size=4,
    ),
}


@pytest.fixture(params=sorted(MODELS), scope="module")
def model(request):
    built = MODELS[request.param]()
    if isinstance(built.backbone, torchvision.models.ConvNeXt):
        built.backbone.classifier[-1] = nn.Identity()
    return built


def test_each_parameter_is_in_one_stage(model):
    stages = ordered_blocks(model)
    found = [id(parameter) for stage in stages for parameter in stage.parameters()]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}
    assert stages[0].name == "stem"
    assert stages[-1].name == "head"
    assert stages[-1].modules == (model.head,)


def test_groups_start_at_zero_and_never_jump(model):
    groups = [stage.group for stage in ordered_blocks(model)]
    assert groups[:2] == [0, 1]
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(groups))
    assert groups[-1] == groups[-2] + 1


def test_names_are_distinct(model):
    names = [stage.name for stage in ordered_blocks(model)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "mobilenet_v2", "efficientnet", "vit", "vgg_bn"),
        *("mobilenet_v3", "regnet", "densenet", "swin"),
        *("timm mobilenetv3", "timm regnet", "timm densenet", "timm swin"),
    ],
)
def test_stages_are_in_the_order_of_the_forward_pass(name):
    model = MODELS[name]().eval()
    order = []
    for index, stage in enumerate(ordered_blocks(model)):
        for module in stage.modules:
            module.register_forward_hook(lambda *_, index=index: order.append(index))
    model.features(torch.rand(1, 3, 32, 32))
    assert order == sorted(order)
    assert set(order) == set(range(len(ordered_blocks(model)) - 1))  # all but the head


def test_resnet18():
    stages = ordered_blocks(_own("resnet18"))
    assert [stage.name for stage in stages] == [
        "stem",
        *(f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)),
        "head",
    ]
    assert [stage.group for stage in stages] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_mobilenet_groups_are_resolutions():
    small, large = _own("mobilenet_v2"), build(ModelInfo("mobilenet_v2", 3, 96, HALF, HALF, 8))
    groups = [stage.group for stage in ordered_blocks(small)]
    assert groups == [0] + [1] * 3 + [2] * 3 + [3] * 7 + [4] * 5 + [5]
    groups = [stage.group for stage in ordered_blocks(large)]
    assert groups == [0, 1] + [2] * 2 + [3] * 3 + [4] * 7 + [5] * 5 + [6]


def test_vgg_groups_lie_between_pools():
    stages = ordered_blocks(_small_vgg(batch_norm=True))
    # stem, 8 | 16, 16 | 16, 16 | two hidden layers, head
    assert [stage.group for stage in stages] == [0, 1, 2, 2, 3, 3, 4, 5, 6]
    kinds = [type(module).__name__ for module in stages[1].modules]
    assert kinds == ["Conv2d", "BatchNorm2d"]


def test_each_block_of_a_vit_is_a_group():
    stages = ordered_blocks(_vit())
    assert [stage.group for stage in stages] == [0, 1, 2, 3, 4]
    assert len(stages[0].extra) == 2  # class token and position embedding


def test_downsampling_of_convnext_joins_the_next_block():
    stages = ordered_blocks(MODELS["timm convnext"]())
    assert [stage.group for stage in stages] == [0] + [1] * 2 + [2] * 2 + [3] * 6 + [4] * 2 + [5]
    assert stages[3].name == "stages.1.blocks.0"


def test_a_dense_layer_is_a_block_and_takes_the_transition_before_it_in():
    stages = ordered_blocks(MODELS["densenet"]())
    assert [stage.group for stage in stages] == [0, 1, 2, 2, 3]
    kinds = [type(module).__name__ for module in stages[2].modules]
    assert kinds == ["_DenseLayer", "_Transition"]


def test_groups_of_regnet_and_swin_are_their_layers():
    groups = [stage.group for stage in ordered_blocks(MODELS["regnet"]())]
    assert groups == [0, 1, 2, 2] + [3] * 7 + [4] * 12 + [5]
    assert [stage.group for stage in ordered_blocks(MODELS["swin"]())] == [0, 1, 2, 2, 3]


def test_without_a_head_the_last_stage_is_a_block():
    stages = ordered_blocks(_own("resnet18", num_classes=None))
    assert stages[-1].name == "layer4.1"
    assert len(stages) == 9


def test_a_plain_network_is_taken_with_its_classifier():
    network = torchvision.models.get_model("resnet18", weights=None)
    stages = ordered_blocks(network)
    assert stages[-1].modules == (network.fc,)
    assert len(stages) == 10


@pytest.mark.parametrize(
    "network",
    [
        torch.nn.Sequential(nn.Conv2d(3, 4, 3)),
        torchvision.models.SqueezeNet("1_1"),
        timm.models.mlp_mixer.MlpMixer(img_size=32, num_blocks=1, embed_dim=32),
    ],
    ids=lambda network: type(network).__name__,
)
def test_other_families_are_refused_with_the_list(network):
    with pytest.raises(ConfigError, match=f"{type(network).__name__}.*ResNet.*ViT.*ConvNeXt"):
        ordered_blocks(network)


def test_a_variant_with_parameters_of_its_own_is_refused_by_name():
    network = _own("resnet18").backbone
    network.register_parameter("gate", nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"no place for backbone\.gate"):
        ordered_blocks(_split(network, 64))
