"""Networks that the user holds as objects: taken apart into backbone and head, and put together.

The head is the last linear layer, whose output has to be that of the network.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bdclean.backbones.split import ModelInfo, SplitModel
from bdclean.errors import ConfigError, in_words
from bdclean.functional.finite import odd_tensor

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_USUAL_SIZE = 224
_PREFIX = "live"

Network = TypeVar("Network", bound=nn.Module)


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
        num_classes: K; None takes that of its last linear layer.
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
    facts = _facts(network, input_size, mean, std)
    net = copy.deepcopy(network).cpu().float().eval()
    if (name := odd_tensor(net.state_dict())) is not None:
        raise ConfigError(f"{_called(network)}: {name} holds numbers that are not finite.")
    head_name, logits, probe = _find_head(net, facts[0])
    head = net.get_submodule(head_name)
    assert isinstance(head, nn.Linear)  # noqa: S101
    if num_classes not in (None, head.out_features):
        raise ConfigError(
            f"num_classes={num_classes}: {_called(network)} has {head.out_features} outputs."
        )
    net.set_submodule(head_name, nn.Identity())
    info = ModelInfo(f"{_PREFIX}:{_called(network)}", head.out_features, *facts)
    model = SplitModel(net, head.in_features, None, info.mean, info.std, info)
    model.info, model.head = info, head  # none is drawn
    model.eval().requires_grad_(True)
    pixels = probe * model.normalize.std.view(-1, 1, 1) + model.normalize.mean.view(-1, 1, 1)
    with torch.no_grad():
        same = torch.allclose(model(pixels), logits, atol=1e-3, rtol=1e-3)
    if not same:
        raise ConfigError(
            f"{_called(network)}: what its last linear layer ({head_name}) takes in is not what "
            "the rest of the network gives, so that it cannot be taken apart."
        )
    return model


def joined(network: Network, model: SplitModel) -> Network:
    """A copy of a network with the weights of its parts.

    Args:
        network: That was taken apart by `split_live`; left as it is.
        model: Its parts, changed since; on any device.

    Returns:
        On the device of `network`, and in its mode.
    """
    whole, state = copy.deepcopy(network), model.backbone.state_dict()
    (name,) = {name.rpartition(".")[0] for name in network.state_dict().keys() - state.keys()}
    head = model.require_head().state_dict()
    whole.load_state_dict({**state, **{f"{name}.{part}": head[part] for part in head}})
    return whole


def _find_head(net: nn.Module, size: int) -> tuple[str, Tensor, Tensor]:
    """The name of the layer whose output is the network's; that output, and what led to it."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: outputs.update({name: output})

    linear = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in linear.items()]
    probe = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits = net(probe)
    except Exception as error:  # the network's own code
        raise ConfigError(
            f"{_called(net)} does not take images of input_size={size}: {in_words(error)}."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ConfigError(
            f"{_called(net)} does not give one row of logits an image; give a network that does."
        )
    for name, output in reversed(outputs.items()):
        if output.shape == logits.shape and torch.equal(output, logits):
            return name, logits, probe
    raise ConfigError(
        f"{_called(net)} does not end in a linear layer, so that it has no classifier head; give "
        "the network without what follows (softmax, for example)."
    )


def _facts(
    network: nn.Module,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[int, Any, Any]:
    settings = getattr(network, "pretrained_cfg", None)  # of timm
    if isinstance(settings, dict) and {"input_size", "mean", "std"} <= settings.keys():
        known = (settings["input_size"][-1], settings["mean"], settings["std"])
    elif type(network).__module__.startswith("torchvision.models"):
        known = (_USUAL_SIZE, *_IMAGENET)
    else:
        known = (None, None, None)
    found: dict[str, Any] = {"input_size": size, "mean": mean, "std": std}
    for key, usual in zip(found, known, strict=True):
        found[key] = usual if found[key] is None else found[key]
    missing = [key for key, value in found.items() if value is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: give what {_called(network)} takes; mean (0, 0, 0) and std "
            "(1, 1, 1) if it normalises images by itself."
        )
    return int(found["input_size"]), tuple(found["mean"]), tuple(found["std"])


def _called(network: nn.Module) -> str:
    return type(network).__qualname__
