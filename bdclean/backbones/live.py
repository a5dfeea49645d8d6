"""Networks that the user holds as objects, where methods expect a weights file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bdclean.backbones.apart import copied, take_apart
from bdclean.backbones.architectures import IMAGENET_MEAN, IMAGENET_STD, TORCHVISION_SIZE
from bdclean.backbones.own_network import IN_MEMORY
from bdclean.backbones.split import ModelInfo, SplitModel
from bdclean.errors import ConfigError
from bdclean.functional.finite import odd_tensor

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class LiveSource:
    """A suspect in memory, where methods expect a weights file; see `WeightsSource`.

    Attributes:
        model: The suspect; each reader gets a copy.
        weights: No file.
        is_there: It is.
    """

    model: SplitModel
    weights: None = None
    is_there: bool = True

    def load(self) -> SplitModel:
        """A copy, in training mode and on the CPU."""
        return self.model.copy().cpu().train()


def split_live(
    network: nn.Module,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SplitModel:
    """Takes a network apart, without changing it.

    Args:
        network: Maps normalised images (B, 3, H, W) to logits (B, K).
        num_classes: K; None takes that of its head.
        input_size: Side of its images. None takes it from timm's `pretrained_cfg`, or 224 for
            networks of torchvision.
        mean: Of the normalisation of its images, in units of [0, 1] pixels; zeros if the network
            normalises by itself. None takes it as `input_size`; ImageNet's for torchvision.
        std: As `mean`; ones if the network normalises by itself.

    Returns:
        A copy, in evaluation mode and on the CPU, for images in [0, 1].

    Raises:
        ConfigError: If an argument is missing or contradicts the network, or the network does not
            end in a linear layer.
    """
    called = type(network).__qualname__
    facts = _facts(network, called, input_size, mean, std)
    ModelInfo(f"{IN_MEMORY}{called}", None, *facts)  # checks them
    if any(v.is_meta for v in network.state_dict(keep_vars=True).values()):
        raise ConfigError(f"{called}: its tensors have no values; load the weights first.")
    net = copied(network, called).cpu().float()
    if (name := odd_tensor(net.state_dict())) is not None:
        raise ConfigError(f"{called}: {name} holds numbers that are not finite.")
    parts = take_apart(net, called, facts[0])
    head = parts.head
    if head.state_dict().keys() - {"weight", "bias"}:
        raise ConfigError(
            f"{called}: the weights of its head {parts.name} are computed from others; remove the "
            "parametrisation first."
        )
    if num_classes not in (None, head.out_features):
        raise ConfigError(f"num_classes={num_classes}: {called} has {head.out_features} outputs.")
    info = ModelInfo(f"{IN_MEMORY}{called}", head.out_features, *facts)
    model = SplitModel(parts.backbone, head.in_features, None, info.mean, info.std, info)
    model.info, model.head = info, head  # none is drawn
    return model.eval().requires_grad_(True)


def is_live(model: SplitModel) -> bool:
    """Whether a model is a network that the user holds, which nobody else can make."""
    return model.info.arch.startswith(IN_MEMORY)


def redrawn(model: SplitModel) -> SplitModel:
    """A copy whose layers have drawn their weights anew, by `reset_parameters`.

    Args:
        model: Left as it is.
    """
    fresh = model.copy()
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return fresh


def unwrapped(network: nn.Module) -> nn.Module:
    """What is inside `torch.compile`, DataParallel and the like, which add no layer."""
    while isinstance(network, _WRAPPERS) or hasattr(network, "_orig_mod"):
        inside: Any = network.module if isinstance(network, _WRAPPERS) else network._orig_mod
        network = inside
    return network


def _facts(
    network: nn.Module,
    called: str,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[int, Any, Any]:
    settings = getattr(network, "pretrained_cfg", None)  # of timm
    if isinstance(settings, dict) and {"input_size", "mean", "std"} <= settings.keys():
        known = (settings["input_size"][-1], settings["mean"], settings["std"])
    elif type(network).__module__.startswith("torchvision.models"):
        known = (TORCHVISION_SIZE, IMAGENET_MEAN, IMAGENET_STD)
    else:
        known = (None, None, None)
    found: dict[str, Any] = {"input_size": size, "mean": mean, "std": std}
    for key, usual in zip(found, known, strict=True):
        found[key] = usual if found[key] is None else found[key]
    missing = [key for key, value in found.items() if value is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: give what {called} takes; mean (0, 0, 0) and std "
            "(1, 1, 1) if it normalises images by itself."
        )
    return int(found["input_size"]), found["mean"], found["std"]
