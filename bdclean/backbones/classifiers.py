"""Where the networks of timm end: their last layers, which weights files hold under many names."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import ConfigError

# No layer of a network has this many outputs but those that were told to.
_CLASSES = 1013


class Side(nn.Module):
    """Puts features beside those of other layers, in the place of one of several classifiers.

    The network averages what these layers give, so the average is all features in a row.

    Args:
        before: Features of the layers before.
        after: Features of the layers after.
        layers: How many layers the network averages.
    """

    def __init__(self, before: int, after: int, layers: int) -> None:
        super().__init__()
        self.padding = (before, after)
        self.layers = layers

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, D) to (B, before + D + after)."""
        return F.pad(features * self.layers, self.padding)


@dataclass(frozen=True)
class Classifiers:
    """The layers of a network that give its answers.

    Attributes:
        names: Their names; none where what they give is not averaged.
        sizes: Features that each takes.
        bias: Whether they have a bias.
        is_more: Whether timm leaves out more than them from a network without classes.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    bias: bool
    is_more: bool

    def cut_from(self, network: nn.Module) -> nn.Module:
        """Takes the classifiers out of a network; it then gives what they take."""
        done = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            whole = len(self.names) == 1
            rest = sum(self.sizes) - done - size
            gap = nn.Identity() if whole else Side(done, rest, len(self.names))
            network.set_submodule(name, gap)
            done += size
        return network


def find_classifiers(create: Callable[[int], nn.Module]) -> Classifiers:
    """Finds the layers with as many outputs as there are classes.

    Args:
        create: Makes the network, for a number of classes, or raises a ConfigError.
    """
    state, without = _shapes(create, _CLASSES), _shapes(create, 0)
    last = [name for name, tensor in state.items() if len(tensor.shape) > 1 and _is_last(tensor)]
    names = tuple(name.removesuffix(".weight") for name in last)
    if len(names) > 1 and not _are_averaged(names):
        names = ()
    own = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    return Classifiers(
        names,
        tuple(state[f"{name}.weight"].shape[1] for name in names),
        all(f"{name}.bias" in state for name in names),
        bool(names) and (len(names) > 1 or without.keys() != state.keys() - own),
    )


def _are_averaged(names: tuple[str, ...]) -> bool:
    """Whether these are a classifier and that of its distillation token, or those of two branches.

    timm's networks average the answers of such pairs, as a test compares.
    """
    if len(names) != 2 or names[0].count(".") != names[1].count("."):
        return False
    parts = zip(names[0].split("."), names[1].split("."), strict=True)
    ((first, second), *others) = [pair for pair in parts if len(set(pair)) > 1]
    return not others and ((first, second) == ("0", "1") or second == f"{first}_dist")


def _shapes(create: Callable[[int], nn.Module], num_classes: int) -> dict[str, Tensor]:
    """State dict of the network; the random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return create(num_classes).state_dict()
        except ConfigError:  # it needs numbers while it is built
            return create(num_classes).state_dict()


def _is_last(weight: Tensor) -> bool:
    return len(weight) == _CLASSES and weight[:1, :1].numel() == 1
