"""The blocks of a network in the order in which an image passes them.

Depth-wise methods use this and no layer names.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torchvision.models as tv
from torch import nn

from bdclean.backbones.cifar_resnet import CifarResNet
from bdclean.backbones.cifar_vgg import CifarVGG
from bdclean.backbones.own_blocks import passed_blocks
from bdclean.backbones.own_network import IN_MEMORY, is_own_network
from bdclean.backbones.preact import PreActResNet
from bdclean.backbones.resnet import ResNet
from bdclean.backbones.split import SplitModel
from bdclean.backbones.wide_resnet import WideResNet
from bdclean.errors import ConfigError

FAMILIES = (
    "ResNet (own, torchvision, timm)",
    "ResNet for CIFAR, PreActResNet and Wide ResNet (own)",
    "MobileNetV2 (own, torchvision, timm)",
    "MobileNetV3 (torchvision, timm)",
    "RegNet (torchvision, timm)",
    "DenseNet (torchvision, timm)",
    "VGG and VGG-BN (own, torchvision, timm)",
    "EfficientNet (torchvision, timm)",
    "ViT (torchvision, timm)",
    "Swin (torchvision, timm)",
    "ConvNeXt (torchvision, timm)",
    "your own networks",
)


@dataclass(frozen=True)
class Block:
    """One block of a network.

    Attributes:
        name: "stem", "head", or where the block is in the backbone ("layer1.0").
        modules: Its modules that have parameters.
        group: 0 for the stem, 1 for the next block, then counted up wherever the spatial
            resolution falls (in a ResNet: the number of the layer). Each block of a ViT and each
            fully connected layer is a group by itself.
        extra: Parameters that belong to no block of the network: class token, position embedding.
    """

    name: str
    modules: tuple[nn.Module, ...]
    group: int
    extra: tuple[nn.Parameter, ...] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the block."""
        for module in self.modules:
            yield from module.parameters()
        yield from self.extra


@dataclass
class _Piece:
    modules: list[nn.Module]
    new_group: bool
    extra: tuple[nn.Parameter, ...] = ()


def ordered_blocks(model: nn.Module) -> list[Block]:
    """Lists the blocks of a network from input to output.

    Args:
        model: A `SplitModel`, or a network of a supported family by itself. A network of the
            user's own is run once, to see the order.

    Returns:
        Stem first, head last (if there is one). Each parameter of backbone and head is in
        exactly one block. ResNet-18 gives the stem, eight blocks and the head.

    Raises:
        ConfigError: If the family is not supported.
    """
    backbone = model.backbone if isinstance(model, SplitModel) else model
    names = {module: name for name, module in backbone.named_modules()}
    blocks: list[Block] = []
    for piece in _pieces_of(model):
        modules = tuple(
            module for module in piece.modules if any(True for _ in module.parameters())
        )
        name = names[modules[0]] if blocks else "stem"
        group = blocks[-1].group + piece.new_group if blocks else 0
        blocks.append(Block(name, modules, group, piece.extra))
    head = model.head if isinstance(model, SplitModel) else _classifier(backbone, blocks)
    if head is not None:
        blocks.append(Block("head", (head,), blocks[-1].group + 1))
    covered = [id(parameter) for block in blocks for parameter in block.parameters()]
    expected = {id(parameter): name for name, parameter in model.named_parameters()}
    left = [name for key, name in expected.items() if key not in covered]
    if left or len(covered) != len(expected):
        raise _unsupported(backbone, f" (no place for {', '.join(left[:3])})")
    return blocks


def _classifier(net: nn.Module, blocks: Sequence[Block]) -> nn.Linear | None:
    covered = {id(parameter) for block in blocks for parameter in block.parameters()}
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and id(linear[-1].weight) not in covered else None


def _unsupported(net: nn.Module, reason: str = "") -> ConfigError:
    return ConfigError(
        f"The order of blocks of {type(net).__name__} is not known{reason}. "
        f"Depth-wise methods take: {', '.join(FAMILIES)}."
    )


def _pieces_of(model: nn.Module) -> list[_Piece]:
    if not isinstance(model, SplitModel):
        return _pieces(model)
    if model.info.arch.startswith(IN_MEMORY):
        with suppress(ConfigError):  # it may be of a library
            return _pieces(model.backbone)
    elif not is_own_network(model.info.arch):
        return _pieces(model.backbone)
    blocks = passed_blocks(model.backbone, model.info.input_size)
    if not blocks:
        raise _unsupported(model.backbone)
    sides = [None, *(block.side for block in blocks)]
    return [
        _Piece(
            block.modules,
            new_group=number < 2 or block.side is None or block.side != before,
            extra=tuple(block.extra),
        )
        for number, (before, block) in enumerate(zip(sides, blocks, strict=False))
    ]


def _pieces(net: nn.Module) -> list[_Piece]:
    if isinstance(net, ResNet | tv.ResNet):
        return _resnet([net.conv1, net.bn1], [net.layer1, net.layer2, net.layer3, net.layer4])
    if isinstance(net, CifarResNet):
        return _resnet([net.conv1, net.bn1], [net.layer1, net.layer2, net.layer3])
    if isinstance(net, PreActResNet):
        return _resnet([net.conv1], net.layers)
    if isinstance(net, WideResNet):
        blocks = _resnet([net.conv1], net.layers)
        blocks[-1].modules.append(net.bn1)
        return blocks
    if isinstance(net, CifarVGG):
        return _vgg(net.features, [])
    if isinstance(net, tv.MobileNetV2 | tv.EfficientNet):
        return _by_stride([net.features[0]], _flat(net.features[1:]))
    if isinstance(net, tv.MobileNetV3):
        blocks = _by_stride([net.features[0]], _flat(net.features[1:]))
        return [*blocks, _Piece([net.classifier[0]], new_group=True)]
    if isinstance(net, tv.RegNet):
        return _resnet([net.stem], list(net.trunk_output.children()))
    if isinstance(net, tv.DenseNet):
        return _densenet(net.features)
    if isinstance(net, tv.SwinTransformer):
        return _pairwise(net.features, [net.norm])
    if isinstance(net, tv.VGG):
        # The last layer of the classifier is the head, or the gap that it left.
        return _vgg(net.features, net.classifier[:-1])
    if isinstance(net, tv.ConvNeXt):
        return _pairwise(net.features, [net.classifier[0]])
    if isinstance(net, tv.VisionTransformer):
        extra = (net.class_token, net.encoder.pos_embedding)
        return _vit([net.conv_proj], extra, net.encoder.layers, [net.encoder.ln])
    if type(net).__module__.startswith("timm."):
        return _timm_pieces(net)
    raise _unsupported(net)


def _timm_pieces(net: nn.Module) -> list[_Piece]:
    # Only here: a network of timm's means that its import has been paid for.
    from timm.models.convnext import ConvNeXt
    from timm.models.densenet import DenseNet
    from timm.models.efficientnet import EfficientNet
    from timm.models.mobilenetv3 import MobileNetV3
    from timm.models.regnet import RegNet
    from timm.models.resnet import ResNet as TimmResNet
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vgg import VGG
    from timm.models.vision_transformer import VisionTransformer

    sub = net.get_submodule
    if isinstance(net, TimmResNet):
        layers = [sub(f"layer{number}") for number in (1, 2, 3, 4)]
        return _resnet([sub("conv1"), sub("bn1")], layers)
    if isinstance(net, EfficientNet):
        blocks = _by_stride([net.conv_stem, net.bn1], _flat(net.blocks))
        return [*blocks, _Piece([net.conv_head, net.bn2], new_group=False)]
    if isinstance(net, MobileNetV3):
        blocks = _by_stride([net.conv_stem, net.bn1], _flat(net.blocks))
        return [*blocks, _Piece([net.conv_head, net.norm_head], new_group=True)]
    if isinstance(net, RegNet):
        blocks = _resnet([net.stem], [sub(f"s{number}") for number in (1, 2, 3, 4)])
        blocks[-1].modules.append(net.final_conv)
        return blocks
    if isinstance(net, DenseNet):
        return _densenet(net.features)
    if isinstance(net, SwinTransformer):
        pairs = [([s.get_submodule("downsample")], s.get_submodule("blocks")) for s in net.layers]
        return _convnext([net.patch_embed], pairs, [net.norm])
    if isinstance(net, VGG):
        return _vgg(net.features, net.pre_logits.children())
    if isinstance(net, ConvNeXt):
        steps = list(sub("stages").children())
        pairs = [([s.get_submodule("downsample")], s.get_submodule("blocks")) for s in steps]
        return _convnext([sub("stem")], pairs, [net.norm_pre, sub("head.norm")])
    if isinstance(net, VisionTransformer):
        tokens = (net.cls_token, net.reg_token, net.pos_embed)
        extra = tuple(token for token in tokens if token is not None)
        return _vit([net.patch_embed, net.norm_pre], extra, net.blocks, [net.norm, net.fc_norm])
    raise _unsupported(net)


def _flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        # Exactly: convolution-norm-activation triples are subclasses, and one block each.
        if type(module) is nn.Sequential:
            yield from module
        else:
            yield module


def _resnet(stem: list[nn.Module], layers: Sequence[nn.Module]) -> list[_Piece]:
    blocks = [
        _Piece([block], new_group=index == 0)
        for layer in layers
        for index, block in enumerate(layer.children())
    ]
    return [_Piece(stem, new_group=True), *blocks]


def _densenet(features: nn.Module) -> list[_Piece]:
    """Each dense layer is a block; the first one takes in the transition before it."""
    blocks = [_Piece([], new_group=True)]
    down: list[nn.Module] = []
    for name, module in features.named_children():
        if name.startswith("denseblock"):
            for index, layer in enumerate(module.children()):
                first = index == 0
                blocks.append(_Piece([layer, *down] if first else [layer], new_group=first))
            down = []
        elif len(blocks) == 1:
            blocks[0].modules.append(module)
        else:
            down.append(module)
    blocks[-1].modules.extend(down)  # the last batch norm
    return blocks


def _by_stride(stem: list[nn.Module], modules: Iterable[nn.Module]) -> list[_Piece]:
    blocks = [
        _Piece([module], new_group=index == 0 or _is_strided(module))
        for index, module in enumerate(modules)
    ]
    return [_Piece(stem, new_group=True), *blocks]


def _is_strided(block: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in block.modules())


def _vgg(features: Iterable[nn.Module], hidden: Iterable[nn.Module]) -> list[_Piece]:
    blocks: list[_Piece] = []
    pooled = True
    for module in features:
        if isinstance(module, nn.Conv2d):
            blocks.append(_Piece([module], new_group=pooled or len(blocks) == 1))
            pooled = False
        elif isinstance(module, nn.MaxPool2d):
            pooled = True
        else:
            blocks[-1].modules.append(module)
    layers = [m for m in hidden if isinstance(m, nn.Linear | nn.Conv2d)]
    return [*blocks, *(_Piece([layer], new_group=True) for layer in layers)]


def _pairwise(features: nn.Sequential, norms: list[nn.Module]) -> list[_Piece]:
    """For torchvision's row of stem, blocks, down-sampling, blocks, down-sampling and so on."""
    steps = list(features[1:])
    pairs = [([], steps[0]), *(([steps[i]], steps[i + 1]) for i in range(1, len(steps), 2))]
    return _convnext([features[0]], pairs, norms)


def _convnext(
    stem: list[nn.Module],
    steps: Iterable[tuple[list[nn.Module], nn.Module]],
    norms: list[nn.Module],
) -> list[_Piece]:
    """Each step is (down-sampling, blocks); the first block takes the down-sampling in."""
    blocks = [_Piece(stem, new_group=True)]
    for down, members in steps:
        for index, block in enumerate(members.children()):
            first = index == 0
            blocks.append(_Piece([block, *down] if first else [block], new_group=first))
    blocks[-1].modules.extend(norms)
    return blocks


def _vit(
    stem: list[nn.Module],
    extra: tuple[nn.Parameter, ...],
    layers: nn.Module,
    norms: list[nn.Module],
) -> list[_Piece]:
    blocks = [_Piece([layer], new_group=True) for layer in layers.children()]
    blocks[-1].modules.extend(norms)
    return [_Piece(stem, new_group=True, extra=extra), *blocks]
