"""State dicts of other libraries, renamed to ours."""

import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from bdclean.backbones.architectures import Parts
from bdclean.backbones.beside import (
    find_head,
    take_head,
    take_moco_heads,
    take_normalisation,
    take_projections,
    take_training_only,
)
from bdclean.backbones.dialects import translated
from bdclean.backbones.spellings import spellings
from bdclean.errors import counted
from bdclean.printable import printable
from bdclean.weights import Nest, Place, Spelling, check_plain, multiplied_out, places, unwrap
from bdclean.weights.match import shared_parts

# Parts of a name that tell of a copy: of equal networks the one with the least is taken.
_TRAINED_BESIDE = ("student", "query")
_COPIES = ("teacher", "ema", "momentum", "target", "key", "k", "attacker", "old", "avg", "swa")
_RANKS = dict.fromkeys(_TRAINED_BESIDE, 1) | dict.fromkeys(_COPIES, 2)
_SHOWN = 8
_Sources = dict[str, list[Tensor]]  # our names, and the tensors of a file that they are made of
_COUNTER = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`, which does not load without
# What solo-learn's pretraining has beside `backbone` and `classifier`.
_SOLO = ("projector", "predictor", "prototypes", "momentum_backbone", "momentum_projector")


@dataclass(frozen=True)
class Source:
    """A tensor of a file.

    Attributes:
        nest: The dict that holds it; what the file has as factors, multiplied out.
        name: Its name there.
    """

    nest: Nest
    name: str

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self.nest.tensors[self.name]


@dataclass(frozen=True)
class Found:
    """The network, at one place of one state dict of a file."""

    nest: Nest
    place: Place

    @property
    def name(self) -> str:
        """Keys and names that lead to it."""
        return printable(f"{self.nest.where}.{self.place.prefix}".strip(".")) or "its top level"

    @property
    def rank(self) -> int:
        """How much its name tells of a copy."""
        words = re.split(r"[._]", f"{self.nest.where}.{self.place.prefix}".lower())
        return max(_RANKS.get(word, 0) for word in words)


@dataclass(frozen=True)
class Foreign:
    """A foreign state dict by our names.

    Attributes:
        state: `backbone.*`, and `head.*` if the file has a classifier. Names that belong to
            neither are kept, for the report of unexpected keys.
        num_classes: Rows of the classifier, None without one.
        normalisation: "mean" and "std" if the file holds them, of images in [0, 1].
        nest: The dict that holds the network, by the names of the file; what it has as factors
            multiplied out.
        prefix: What the names of the network begin with there.
        sources: Of each tensor of the network (`backbone.*`, `head.*`, `normalize.*`), what it was
            made of: one tensor of the file, the parts that it has there in a row, or one of each of
            the averaged classifiers.
        kept: Tensors beside the network that belong to its architecture.
        copies: Where else the network is.
        told: Parts of a sentence, if not all of the file is taken.
        library: Whose names the network has, "" for those of torchvision or timm.
    """

    state: dict[str, Tensor]
    num_classes: int | None
    normalisation: dict[str, Tensor]
    nest: Nest
    prefix: str = ""
    sources: dict[str, tuple[Source, ...]] = field(default_factory=dict)
    kept: tuple[Source, ...] = ()
    copies: tuple[Found, ...] = ()
    told: tuple[str, ...] = ()
    library: str = ""


def split_foreign(nests: Sequence[Nest], parts: Parts, weights: str | Path) -> Foreign:
    """Renames a foreign state dict; see `Foreign`.

    The network is where most tensors fit the architecture by name and shape.

    Raises:
        WeightsError: If the state dict holds more than plain tensors.
    """
    expected = parts.backbone.state_dict()
    ways = spellings(expected, parts.backbone)
    read = [translated(plain(nest), weights) for nest in nests]
    nests = [each.nest for each in read]
    found = [Found(nest, place) for nest in nests for place in places(nest.tensors, expected, ways)]
    if not found:  # report the names as they are in the file
        largest = max((each.origin for each in read), key=lambda nest: len(nest.tensors))
        check_plain(largest, weights)
        return Foreign(largest.tensors, None, {}, largest)
    chosen, copies = _choose(found, len(expected))
    check_plain(chosen.nest, weights)
    inside, rest = unwrap(chosen.nest.tensors, chosen.place.prefix)
    left_out = take_moco_heads(inside, chosen.place.prefix)
    state = _backbone_of(inside, rest, expected, ways[chosen.place.spelling])
    left_out += _take_copies(rest, chosen, copies, expected)
    kept, training = _take_training(rest, parts)
    normalisation, of_normalisation = _normalisation_of(rest)
    head, num_classes, of_head = _head_of(rest, parts)
    unused: list[str] = []
    if num_classes is None:
        used = [id(each.nest) for each in (chosen, *copies)]
        others = [nest for nest in nests if id(nest) not in used]
        head, num_classes, of_head, unused = _head_beside(others, chosen.nest.where, parts)
    tops = {name.split(".")[0] for name in expected}
    projections = take_projections(rest, parts.num_features, tops)
    alone = [*left_out, *training, *(top for top, _ in kept)]
    taken = {**{name: [tensor] for name, tensor in state.items()}, **of_head, **of_normalisation}
    origin = {
        id(t): [Source(each.origin, part) for part in each.names[name]]
        for each in read
        for name, t in each.nest.tensors.items()
    }
    of_chosen = next(each for each in read if each.nest is chosen.nest)
    beside = [Source(of_chosen.origin, name) for name in of_chosen.beside]
    return Foreign(
        {**_left(rest, expected), **state, **head},
        num_classes,
        normalisation,
        of_chosen.origin,
        chosen.place.prefix,
        sources={
            ours: tuple(source for tensor in given for source in origin[id(tensor)])
            for ours, given in taken.items()
        },
        kept=(*(source for _, tensor in kept for source in origin[id(tensor)]), *beside),
        copies=tuple(copies),
        told=_told(chosen, copies, alone, of_chosen.beside, projections, unused),
        library=of_chosen.library,
    )


def plain(nest: Nest) -> Nest:
    """The same, factors multiplied out; a tensor that has two names is two objects."""
    apart = {name: tensor.detach() for name, tensor in nest.tensors.items()}
    return replace(nest, tensors=multiplied_out(apart))


def _backbone_of(
    inside: Mapping[str, Tensor],
    rest: dict[str, Tensor],
    expected: Container[str],
    spell: Spelling,
) -> dict[str, Tensor]:
    """The tensors of the backbone; what else is under its prefix is put into `rest`."""
    state: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        ours = spell(name)
        if ours in expected and f"backbone.{ours}" not in state:
            state[f"backbone.{ours}"] = tensor
        else:
            rest[f"backbone.{name}" if name in rest else name] = tensor
    return state


def _gone(before: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in before.items() if name not in rest}


def _take_training(
    rest: dict[str, Tensor], parts: Parts
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """Takes what only training needs.

    Returns:
        Parts and tensors that the library's own module has, and the parts of all others.
    """
    before = dict(rest)
    taken = take_training_only(rest, parts.auxiliary)
    kept_parts = (*parts.auxiliary, _COUNTER)
    pairs = list(zip(taken, _gone(before, rest).values(), strict=True))
    kept = [pair for pair in pairs if pair[0] in kept_parts]
    return kept, [part for part, _ in pairs if part not in kept_parts]


def _normalisation_of(rest: dict[str, Tensor]) -> tuple[dict[str, Tensor], _Sources]:
    """As `take_normalisation`, with the tensors that it took."""
    before = dict(rest)
    normalisation = take_normalisation(rest)
    gone = _gone(before, rest)
    return normalisation, {
        f"normalize.{key}": [tensor for name, tensor in gone.items() if name.endswith(key)]
        for key in normalisation
    }


def _head_of(
    rest: dict[str, Tensor], parts: Parts
) -> tuple[dict[str, Tensor], int | None, _Sources]:
    """As `take_head`, with the tensors that it took."""
    layers = find_head(rest, parts)
    taken = {
        f"head.{end}": [rest[f"{layer}.{end}"] for layer in layers if f"{layer}.{end}" in rest]
        for end in ("weight", "bias")
    }
    return *take_head(rest, parts), {name: tensors for name, tensors in taken.items() if tensors}


def _left(rest: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """What has no place, never by a name that the network would take for its own."""
    own = {f"backbone.{name}" for name in expected}
    heads = ("head.", "normalize.")
    return {
        f"{name} beside the network" if name in own or name.startswith(heads) else name: tensor
        for name, tensor in rest.items()
    }


def _choose(found: Sequence[Found], size: int) -> tuple[Found, list[Found]]:
    """The place of the network, and those of its copies."""

    def order(each: Found) -> tuple[int, int, int, int]:
        return -each.place.fits, -each.place.names, each.rank, each.place.spelling

    chosen = min(found, key=order)  # the first of equals
    enough = max(chosen.place.fits, size // 2) / 2
    copies = {
        each.name: each for each in found if each.place.fits > enough and each.name != chosen.name
    }
    return chosen, list(copies.values())


def _told(
    chosen: Found,
    copies: Sequence[Found],
    left_out: Sequence[str],
    beside: Sequence[str],
    projections: Sequence[str],
    unused: Sequence[str],
) -> tuple[str, ...]:
    """Says what is not taken, in parts of a sentence."""
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
            [_part_beside(name.removeprefix(chosen.place.prefix)) for name in beside],
            {
                "tensor": "belongs to another part of the model",
                "tensors": "belong to other parts of the model",
            },
        ),
        (
            projections,
            {
                "tensor": "is a head (a projection)",
                "tensors": "are a head of several layers (a projection)",
            },
        ),
    ):
        if names:
            one, many = (f"{noun} under {listed(names)} {does}" for noun, does in what.items())
            told.append(counted(len(names), f"{one} and is left out", f"{many} and are left out"))
    if unused:
        named = ", ".join(map(printable, unused[:_SHOWN]))
        told.append(f"what lies in {named} may be a head of this network and is not used")
    return tuple(told)


def _part_beside(name: str) -> str:
    """What is said of a tensor beside a network: its part, or its name where the network is too."""
    top = name.split(".")[0]
    return name if top in ("visual", "vision_model") else top


def listed(names: Iterable[str]) -> str:
    """The first few names, each once."""
    parts = sorted(set(map(printable, names)), key=lambda part: ("." in part, part))
    return ", ".join(parts[:_SHOWN]) + (", ..." if len(parts) > _SHOWN else "")


def _head_beside(
    nests: Sequence[Nest], where: str, parts: Parts
) -> tuple[dict[str, Tensor], int | None, _Sources, list[str]]:
    """The classifier, if it lies in another dict than the backbone.

    Args:
        nests: The other dicts of the file.
        where: The keys that lead to the backbone.
        parts: Of the architecture.

    Returns:
        As `_head_of`, of the first dict beside the backbone that is one, and else where there are
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
        head, num_classes, sources = _head_of(rest, parts)
        if num_classes is not None and "head.bias" in head:
            return head, num_classes, sources, []
        if takes:
            unused.append(nest.where or "the top level")
    return {}, None, {}, unused


def _take_copies(
    rest: dict[str, Tensor], chosen: Found, copies: Sequence[Found], expected: dict[str, Tensor]
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


def is_of_solo_learn(nests: Sequence[Nest]) -> bool:
    """Whether the names in a file are those that solo-learn writes."""
    tops = {name.split(".")[0] for nest in nests for name in nest.tensors}
    return {"backbone", "classifier"} <= tops and bool(tops & set(_SOLO))


def warn_of_solo_learn(nests: Sequence[Nest], weights: str | Path, arch: str) -> None:
    """Tells of a CIFAR ResNet of solo-learn: it fits ours by name and shape, and is another."""
    if is_of_solo_learn(nests):
        warnings.warn(
            f"{printable(weights)} looks like a file of solo-learn, whose first convolution for "
            f"CIFAR pads by 2 pixels; {arch} pads by 1 and computes other features. "
            f"If so, name it solo:{arch}.",
            stacklevel=2,
        )
