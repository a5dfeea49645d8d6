"""Backbones of shapes alone, to compare with a file before memory is taken for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bdclean.backbones.architectures import Parts, is_made_for_a_size, make_parts, usual_size
from bdclean.backbones.own_network import is_own_network
from bdclean.backbones.split import ModelInfo
from bdclean.errors import ConfigError
from bdclean.weights import bounds

_WEIGHTS_BEGIN_AS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
# Calls of torch for each gigabyte of the limit. A MaxViT of 2 GB takes 105,000 in all; some
# networks take as many as their input size squared.
_CALLS = 100_000


class _Counted(TorchFunctionMode):
    """Refuses a network whose building takes endless calls of torch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._left = int(_CALLS * bounds.limit())

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise bounds.too_much(self._name, "describes a network that takes minutes to build")
        return func(*args, **(kwargs or {}))


class _WithoutNumbers(TorchFunctionMode):
    """Makes weights of shapes alone, and real numbers of what networks compute shapes from."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WEIGHTS_BEGIN_AS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def shapes(info: ModelInfo, name: str, num_features: int | None = None) -> Parts:
    """Builds a backbone of shapes alone.

    Args:
        info: What to build, as a file describes it; canonical. A network of the user's own is
            built with its numbers, as it may need them.
        name: What the file is called.
        num_features: D, where it is known.

    Raises:
        ConfigError: If there is no such backbone.
        WeightsError: If building it would take too long.
        RuntimeError, TypeError, ValueError, OverflowError: If its sizes are out of all range.
    """
    if is_own_network(info.arch):
        return make_parts(info)
    if not is_made_for_a_size(info.arch):  # then larger images have as many features
        usual = usual_size(info.arch) or info.input_size
        info = replace(info, input_size=min(info.input_size, usual))
    with _Counted(name):
        try:
            with torch.device("meta"):
                return make_parts(info, num_features)
        except ConfigError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
        # torchvision's RegNets need numbers while they are built
        with _WithoutNumbers():
            return make_parts(info, num_features)


def check_memory(backbone: nn.Module, name: str) -> None:
    """Refuses a network that would keep more beside its weights than is read of a file.

    What it keeps beside them, such as the places that attention looks up, can grow with the fourth
    power of the input size, where a weight grows with the second.

    Args:
        backbone: Of shapes alone.
        name: What the file is called.

    Raises:
        WeightsError: If it would.
    """
    kept = backbone.state_dict().keys()
    size = sum(buffer.nbytes for key, buffer in backbone.named_buffers() if key not in kept)
    if size > bounds.limit() * 1e9:
        raise bounds.too_much(
            name, f"describes a network that takes {size / 1e9:,.1f} GB beside its tensors"
        )
