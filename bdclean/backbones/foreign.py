"""State dicts of other libraries, renamed to ours."""

import re
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from bdclean.backbones.architectures import Parts
from bdclean.backbones.beside import (
    take_head,
    take_moco_heads,
    take_normalisation,
    take_projections,
    take_training_only,
)
from bdclean.errors import counted
from bdclean.printable import printable
from bdclean.weights import Nest, Place, Spelling, check_plain, multiplied_out, places, unwrap
from bdclean.weights.match import shared_parts

# Parts of a name that tell of a copy: of equal networks the one with the least is taken.
_TRAINED_BESIDE = ("student", "query")
_COPIES = ("teacher", "ema", "momentum", "target", "key", "k", "attacker", "old", "avg", "swa")
_RANKS = dict.fromkeys(_TRAINED_BESIDE, 1) | dict.fromkeys(_COPIES, 2)
# What PyTorch puts into names: data parallel training, and torch.compile.
_INSERTED = ("module", "_orig_mod")
_SHOWN = 8
# What solo-learn's pretraining has beside `backbone` and `classifier`.
_SOLO = ("projector", "predictor", "prototypes", "momentum_backbone", "momentum_projector")


@dataclass(frozen=True)
class Foreign:
    """A foreign state dict by our names.

    Attributes:
        state: `backbone.*`, and `head.*` if the file has a classifier. Names that belong to
            neither are kept, for the report of unexpected keys.
        num_classes: Rows of the classifier, None without one.
        normalisation: "mean" and "std" if the file holds them, of images in [0, 1].
    """

    state: dict[str, Tensor]
    num_classes: int | None
    normalisation: dict[str, Tensor]


@dataclass(frozen=True)
class _Found:
    """The network, at one place of one state dict of a file."""

    nest: Nest
    place: Place

    @property
    def name(self) -> str:
        return printable(f"{self.nest.where}.{self.place.prefix}".strip(".")) or "its top level"

    @property
    def rank(self) -> int:
        words = re.split(r"[._]", f"{self.nest.where}.{self.place.prefix}".lower())
        return max(_RANKS.get(word, 0) for word in words)


def split_foreign(nests: Sequence[Nest], parts: Parts, weights: str | Path) -> Foreign:
    """Renames a foreign state dict; see `Foreign`.

    The network is where most tensors fit the architecture by name and shape. A warning tells which
    one is taken where there are several, and what is left out.

    Raises:
        WeightsError: If the state dict holds more than plain tensors.
    """
    expected = parts.backbone.state_dict()
    spellings = _spellings(expected, parts.backbone)
    nests = [replace(nest, tensors=multiplied_out(nest.tensors)) for nest in nests]
    found = [
        _Found(nest, place) for nest in nests for place in places(nest.tensors, expected, spellings)
    ]
    if not found:  # report the names as they are in the file
        largest = max(nests, key=lambda nest: len(nest.tensors))
        check_plain(largest, weights)
        return Foreign(largest.tensors, None, {})
    chosen, copies = _choose(found, len(expected))
    check_plain(chosen.nest, weights)
    prefix, spell = chosen.place.prefix, spellings[chosen.place.spelling]
    inside, rest = unwrap(chosen.nest.tensors, prefix)
    left_out = take_moco_heads(inside, prefix)
    state: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        ours = spell(name)
        if ours in expected and f"backbone.{ours}" not in state:
            state[f"backbone.{ours}"] = tensor
        else:
            rest[f"backbone.{name}" if name in rest else name] = tensor
    left_out += _take_copies(rest, chosen, copies, expected)
    left_out += take_training_only(rest, parts.auxiliary)
    normalisation = take_normalisation(rest)
    head, num_classes = take_head(rest, parts)
    unused: list[str] = []
    if num_classes is None:
        others = [
            nest for nest in nests if all(nest is not each.nest for each in (chosen, *copies))
        ]
        head, num_classes, unused = _head_beside(others, chosen.nest.where, parts)
    tops = {name.split(".")[0] for name in expected}
    projections = take_projections(rest, parts.num_features, tops)
    _tell(weights, chosen, copies, left_out, projections, unused)
    own = {f"backbone.{name}" for name in expected}
    left = {_beside(name, own): tensor for name, tensor in rest.items()}
    return Foreign({**left, **state, **head}, num_classes, normalisation)


def _beside(name: str, own: Container[str]) -> str:
    """The name of a tensor that has no place: never one that the network would take for its own."""
    ours = name in own or name.startswith(("head.", "normalize."))
    return f"{name} beside the network" if ours else name


def _choose(found: Sequence[_Found], size: int) -> tuple[_Found, list[_Found]]:
    """The place of the network, and those of its copies."""

    def order(each: _Found) -> tuple[int, int, int, int]:
        return -each.place.fits, -each.place.names, each.rank, each.place.spelling

    chosen = min(found, key=order)  # the first of equals
    enough = max(chosen.place.fits, size // 2) / 2
    copies = {
        each.name: each for each in found if each.place.fits > enough and each.name != chosen.name
    }
    return chosen, list(copies.values())


def _tell(
    weights: str | Path,
    chosen: _Found,
    copies: Sequence[_Found],
    left_out: Sequence[str],
    projections: Sequence[str],
    unused: Sequence[str],
) -> None:
    """Warns of what is not taken, in one sentence."""
    told = []
    if copies:
        others = ", ".join(copy.name for copy in copies)
        told.append(
            f"the network is there more than once, and that of {chosen.name} is taken, not that of "
            f"{others}"
        )
    for names, what in (
        (left_out, {"tensor": "serves training alone", "tensors": "serve training alone"}),
        (
            projections,
            {
                "tensor": "is a head (a projection)",
                "tensors": "are a head of several layers (a projection)",
            },
        ),
    ):
        if names:
            parts = sorted(set(map(printable, names)), key=lambda part: ("." in part, part))
            named = ", ".join(parts[:_SHOWN]) + (", ..." if len(parts) > _SHOWN else "")
            one, many = (f"{noun} under {named} {does}" for noun, does in what.items())
            told.append(counted(len(names), f"{one} and is left out", f"{many} and are left out"))
    if unused:
        named = ", ".join(map(printable, unused[:_SHOWN]))
        told.append(f"what lies in {named} may be a head of this network and is not used")
    if told:
        warnings.warn(f"{printable(weights)}: {'; '.join(told)}.", stacklevel=3)


def _head_beside(
    nests: Sequence[Nest], where: str, parts: Parts
) -> tuple[dict[str, Tensor], int | None, list[str]]:
    """The classifier, if it lies in another dict than the backbone.

    Args:
        nests: The other dicts of the file.
        where: The keys that lead to the backbone.
        parts: Of the architecture.

    Returns:
        As `take_head`, of the first dict beside the backbone that is one, and else where there are
        layers that take the features.
    """
    parent, unused = where.rpartition(".")[0], []
    for nest in nests:
        above, _, key = nest.where.rpartition(".")
        if where and nest.where == parent:
            rest = dict(nest.tensors)
        elif nest.where and above == parent:
            rest = {f"{key}.{name}": tensor for name, tensor in nest.tensors.items()}
        else:
            continue
        take_training_only(rest, parts.auxiliary)
        takes = any(t.ndim == 2 and t.shape[1] == parts.num_features for t in rest.values())
        head, num_classes = take_head(rest, parts)
        if num_classes is not None and "head.bias" in head:
            return head, num_classes, []
        if takes:
            unused.append(nest.where or "the top level")
    return {}, None, unused


def _take_copies(
    rest: dict[str, Tensor], chosen: _Found, copies: Sequence[_Found], expected: dict[str, Tensor]
) -> list[str]:
    """Takes what belongs to the copies out of `rest`."""
    taken: list[str] = []
    for copy in copies:
        if copy.nest is not chosen.nest:
            continue
        prefix = copy.place.prefix
        top = prefix[len(shared_parts(prefix, chosen.place.prefix)) :].split(".")[0]
        of_copy = [
            name for name in rest if (name.split(".")[0] == top if top else name in expected)
        ]
        taken += [top or "the top level"] * len(of_copy)
        for name in of_copy:
            del rest[name]
    return taken


def warn_of_solo_learn(nests: Sequence[Nest], weights: str | Path, arch: str) -> None:
    """Tells of a CIFAR ResNet of solo-learn: it fits ours by name and shape, and is another."""
    tops = {name.split(".")[0] for nest in nests for name in nest.tensors}
    if {"backbone", "classifier"} <= tops and tops & set(_SOLO):
        warnings.warn(
            f"{printable(weights)} looks like a file of solo-learn, whose first convolution for "
            f"CIFAR pads by 2 pixels; {arch} pads by 1 and computes other features. "
            f"If so, name it solo:{arch}.",
            stacklevel=2,
        )


def _spellings(expected: dict[str, Tensor], backbone: nn.Module) -> tuple[Spelling, ...]:
    """The ways in which libraries write the names of a network, the usual one first."""

    def usual(name: str) -> str:
        # The CIFAR ResNets of github.com/kuangliu/pytorch-cifar say shortcut for downsample.
        other = name.replace(".shortcut.", ".downsample.")
        return other if other in expected else name

    def without_inserted(name: str) -> str:
        first, dot, others = name.partition(".")
        kept = [part for part in others.split(".") if part not in _INSERTED]
        return usual(f"{first}{dot}{'.'.join(kept)}")

    if not {"conv1.weight", "layer4.0.conv1.weight"} <= expected.keys():
        return usual, without_inserted
    pooling = [True]
    if isinstance(getattr(backbone, "maxpool", None), nn.Identity):
        pooling.append(False)
    return usual, without_inserted, *(_numbered(with_pooling) for with_pooling in pooling)


def _numbered(with_pooling: bool) -> Spelling:
    """For the parts of torchvision's ResNet in an `nn.Sequential`; ReLU and pooling count.

    lightly's own ResNet for CIFAR loses a ReLU when it is taken apart, so that it is another
    network, and its numbers are left to the report of names that do not fit.
    """
    first = 4 if with_pooling else 3
    names = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}

    def spell(name: str) -> str:
        number, dot, end = name.partition(".")
        return f"{names.get(number, number)}{dot}{end}"

    return spell
