"""Names of architectures, and their backbones without the classifier."""

import difflib
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import MobileNetV2

from bdclean.backbones.cifar import CIFAR, NAMES, check_cifar, make_cifar
from bdclean.backbones.classifiers import Classifiers, find_classifiers
from bdclean.backbones.own_network import is_own_network, make_own_network
from bdclean.backbones.resnet import ResNetStem, resnet18, resnet34
from bdclean.backbones.split import ModelInfo, Stem
from bdclean.errors import ConfigError, in_a_sentence
from bdclean.types import RGB

OWN = ("resnet18", "resnet34", "mobilenet_v2")
"""Our own networks that can have a stem for small or for large images."""
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
DEFAULT_INPUT_SIZE = 32
TORCHVISION_SIZE = 224  # pixels
SMALL_IMAGE = 64  # pixels; up to here "auto" is the stem for small images
_RELATIVES = 8  # that are compared with a file
# torchvision's table (expansion, channels, blocks, stride), with stride 1 in the second row.
_SMALL_MOBILENET = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]
# Classifiers in the middle of a network that only its training from scratch uses.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


@dataclass(frozen=True)
class Parts:
    """A backbone and what is known about it.

    Attributes:
        backbone: Maps normalised images (B, 3, H, W) to features that flatten to (B, D).
        num_features: D.
        heads: Names of the classifiers in the state dicts of the library. Of several the network
            averages the answers, and D counts the features of them all.
        bias: Whether they have a bias.
        auxiliary: First parts of further names in the state dicts, which only training needs.
    """

    backbone: nn.Module
    num_features: int
    heads: tuple[str, ...]
    bias: bool = True
    auxiliary: tuple[str, ...] = ()


def option_of(key: str) -> str:
    """What a user types on the command line for a field of `ModelInfo`."""
    return f"--data.{key}" if key in ("input_size", "mean", "std") else f"--model.{key}"


def canonical(info: ModelInfo) -> ModelInfo:
    """Resolves a bare name to its library and "auto" to a stem.

    Raises:
        ConfigError: If the name is unknown, or `width` or `stem` do not fit it.
    """
    arch = full_name(info.arch)
    if arch in OWN:
        small = info.input_size <= SMALL_IMAGE
        automatic: Stem = "cifar" if small else "imagenet"
        return replace(info, arch=arch, stem=automatic if info.stem == "auto" else info.stem)
    if arch in CIFAR:
        check_cifar(arch, info.width, info.input_size, info.stem)
        return replace(info, arch=arch, stem="cifar")
    if info.width != 64:
        raise ConfigError(
            f"width={info.width}: only {', '.join(OWN)}, {NAMES} have a width; not {arch}."
        )
    if arch.startswith("solo:"):
        if info.stem == "imagenet":
            raise ConfigError(f"stem='imagenet': {arch} has its own; leave stem out.")
        return replace(info, arch=arch, stem="cifar")
    if info.stem == "cifar":
        raise ConfigError(f"stem='cifar': only {', '.join(OWN)} have it; not {arch}.")
    return replace(info, arch=arch, stem="imagenet")


def make_parts(info: ModelInfo, num_features: int | None = None) -> Parts:
    """Builds the backbone of a canonical description; see `bdclean.backbones.build`.

    Args:
        info: What to build.
        num_features: D, where it is known; else networks of the libraries are run once for it.
    """
    if is_own_network(info.arch):
        own = make_own_network(info.arch, info.input_size)
        has_bias = own.head.bias is not None
        return Parts(own.backbone, own.head.in_features, (own.name,), has_bias)
    library, _, name = info.arch.rpartition(":")
    if library == "torchvision":
        return _torchvision(name, info, num_features)
    if library == "timm":
        return _timm(name, info, num_features)
    if library == "solo":
        return _solo(name, info, num_features)
    if name in CIFAR:
        small = make_cifar(name, info.width)
        return Parts(small, small.num_features, (CIFAR[name].head,))
    stem: ResNetStem = "cifar" if info.stem == "cifar" else "imagenet"
    if name == "mobilenet_v2":
        return _mobilenet(info.width, small=stem == "cifar")
    network = (resnet18 if name == "resnet18" else resnet34)(info.width, stem)
    return Parts(network, network.num_features, ("fc",))


def whole_network(info: ModelInfo, *, auxiliary: bool = False) -> nn.Module | None:
    """The library's own network with its classifier, of shapes alone; None for networks of ours.

    Args:
        info: What to build, canonical. Without classes torchvision's has its usual classifier.
        auxiliary: Whether with the classifiers in its middle, where it can have them.
    """
    library, _, name = info.arch.rpartition(":")
    classes = info.num_classes
    with torch.device("meta"):
        if library == "timm":
            return _create_timm(name, info, classes or 0)
        if library == "torchvision":
            given = {} if classes is None else {"num_classes": classes}
            given |= {"aux_logits": True} if auxiliary else {}
            return _create_torchvision(name, info, **given)
    return None


def full_name(arch: str) -> str:
    """The canonical name of an architecture: with its library, but for our own.

    A network of the user's own keeps its name, whether it is there or not.

    Raises:
        ConfigError: If the name is unknown.
    """
    if is_own_network(arch):
        return arch
    library, _, name = arch.rpartition(":")
    if not library and (name in OWN or name in CIFAR):
        return name
    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    if library in ("", "torchvision") and name in torchvision_names:
        return f"torchvision:{name}"
    if library == "solo" and name in torchvision_names and name.startswith("resnet"):
        return arch
    import timm  # seconds; most runs do not need it

    # is_model() knows registered names alone, so that no name leads to a download.
    if library in ("", "timm") and timm.is_model(name):
        return f"timm:{name}"
    libraries = {
        "torchvision": torchvision_names,
        "timm": timm.list_models(),
        "solo": [each for each in torchvision_names if each.startswith("resnet")],
    }
    known = libraries.get(library, {*OWN, *CIFAR, *torchvision_names, *timm.list_models()})
    close = difflib.get_close_matches(name, sorted(known), n=3)
    names = [f"{library}:{each}" if library in libraries else each for each in close]
    hint = f" Did you mean {', '.join(names)}?" if close else ""
    if not library and "." in name and not close:
        module, _, kind = name.rpartition(".")
        hint = f" A network of your own is written {module}:{kind}."
    raise ConfigError(
        f"arch={arch!r} is unknown.{hint} Allowed: {', '.join(OWN)}, {NAMES}, torchvision:<name>, "
        "timm:<name>, solo:<name of a ResNet>, <module>:<class> for a network of your own."
    )


def has_width(arch: str) -> bool:
    """Whether `width` scales the channels of a canonical architecture."""
    return arch in OWN or arch in CIFAR


def _mobilenet(width: int, *, small: bool) -> Parts:
    """MobileNetV2 of torchvision; width 64 is its width multiplier 1.

    For small images the first convolution and the first strided stage get stride 1, as in the
    CIFAR networks of github.com/kuangliu/pytorch-cifar, so that 32 pixels end as 4 by 4.
    """
    rows = _SMALL_MOBILENET if small else None
    network = MobileNetV2(width_mult=width / 64, inverted_residual_setting=rows)
    if small:
        network.features[0][0].stride = (1, 1)
    features = network.last_channel
    network.classifier = nn.Identity()
    return Parts(network, features, ("classifier.1",))


def is_made_for_a_size(arch: str) -> bool:
    """Whether the layers of a canonical architecture depend on the size of the images."""
    library, _, name = arch.rpartition(":")
    if library == "timm":
        import timm

        settings = timm.get_pretrained_cfg(name)
        return settings is not None and bool(settings.fixed_input_size)
    return library == "torchvision" and name.startswith("vit_")


def usual_size(arch: str) -> int | None:
    """Side of the images that a canonical architecture is published for, if it is known."""
    library, _, name = arch.rpartition(":")
    if library != "timm":
        return TORCHVISION_SIZE if library == "torchvision" else None
    import timm

    settings = timm.get_pretrained_cfg(name)
    return None if settings is None else int(settings.input_size[-1])


def usual_colours(arch: str) -> tuple[RGB, RGB]:
    """Mean and std that a canonical architecture is published with; else ImageNet's."""
    library, _, name = arch.rpartition(":")
    if library == "timm":
        import timm

        settings = timm.get_pretrained_cfg(name)
        if settings is not None and len(settings.mean) == 3:
            (red, green, blue), (r, g, b) = settings.mean, settings.std
            return (red, green, blue), (r, g, b)
    if arch in CIFAR:
        return CIFAR[arch].colours
    return IMAGENET_MEAN, IMAGENET_STD


def is_published(arch: str) -> bool:
    """Whether there are weights of a canonical architecture."""
    library, _, name = arch.rpartition(":")
    if library != "timm":
        return True
    import timm

    settings = timm.get_pretrained_cfg(name)
    return settings is not None and bool(settings.has_weights)


def relatives(arch: str) -> list[str]:
    """Architectures whose names are like this canonical one, the likest first."""
    library, _, name = arch.rpartition(":")
    if library == "timm":
        import timm

        known, library = timm.list_models(), "timm"
    else:
        known, library = torchvision.models.list_models(module=torchvision.models), "torchvision"
    close = difflib.get_close_matches(name, known, n=_RELATIVES, cutoff=0.5)
    others = [f"{library}:{each}" for each in close if each != name]
    return [*(each for each in OWN if arch in OWN and each != arch), *others]


def _torchvision(name: str, info: ModelInfo, num_features: int | None) -> Parts:
    network = _create_torchvision(name, info)
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"arch={info.arch!r} does not end in a linear layer, so it has no head.")
    # The last one is the classifier; hidden layers before it (VGG) belong to the backbone.
    head = linear[-1]
    bias = network.get_submodule(head).bias is not None
    network.set_submodule(head, nn.Identity())
    features = num_features or _measure(network, info)
    return Parts(network, features, (head,), bias, AUXILIARY.get(name, ()))


def _create_torchvision(name: str, info: ModelInfo, **arguments: int | bool) -> nn.Module:
    if is_made_for_a_size(info.arch):
        arguments["image_size"] = info.input_size
    if name in ("googlenet", "inception_v3"):
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    try:
        made: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise _does_not_fit(info, error) from error
    return made


def _solo(name: str, info: ModelInfo, num_features: int | None) -> Parts:
    """The ResNets that solo-learn trains on CIFAR: torchvision's with a stem that pads by two."""
    parts = _torchvision(name, info, num_features)
    parts.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=2, bias=False)
    parts.backbone.maxpool = nn.Identity()
    return parts


def _timm(name: str, info: ModelInfo, num_features: int | None) -> Parts:
    classifiers = _classifiers_of(name, info)
    network = _create_timm(name, info, 1 if classifiers.is_more else 0)
    if classifiers.is_more:
        network = classifiers.cut_from(network)
    features = num_features or _measure(network, info)
    return Parts(network, features, classifiers.names, classifiers.bias)


@lru_cache
def _classifiers_of(name: str, info: ModelInfo) -> Classifiers:
    """The classifiers of a network of timm, for which it is made twice, of shapes alone."""
    return find_classifiers(partial(_create_timm, name, info))


def _create_timm(name: str, info: ModelInfo, num_classes: int) -> nn.Module:
    import timm

    fixed = is_made_for_a_size(info.arch)
    arguments: dict[str, Any] = {"img_size": info.input_size} if fixed else {}
    try:
        made: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, **arguments
        )
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise _does_not_fit(info, error) from error
    return made


def _measure(network: nn.Module, info: ModelInfo) -> int:
    # One pass says how many features there are, for any family, and whether the size fits.
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, 3, info.input_size, info.input_size))
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise _does_not_fit(info, error) from error
    network.train()
    return int(output.flatten(1).shape[1])


def _does_not_fit(info: ModelInfo, error: Exception) -> ConfigError:
    reason = in_a_sentence(str(error).strip().split("\n")[0])
    usual = usual_size(info.arch)
    hint = f" Its usual input_size is {usual}." if usual not in (None, info.input_size) else ""
    return ConfigError(
        f"arch={info.arch!r} does not take input_size={info.input_size}: {reason}{hint}"
    )
