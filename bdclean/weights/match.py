"""Names of a weights file against the names of a model."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bdclean.printable import printable

Spelling = Callable[[str], str]
"""Another way to write a name of the model: it gives the model's for the file's, or any text."""

_COUNTER = "num_batches_tracked"  # evaluation does not use it, and old files lack it
_INSERTED = 4  # parts that a file may have in the middle of a name, and the model not
_SHOWN = 5


@dataclass(frozen=True)
class KeyReport:
    """What does not fit between a model and a file.

    Attributes:
        missing: Names of the model that the file lacks.
        unexpected: Names of the file that the model lacks.
        misshaped: "name: file's dtype and shape instead of the model's" where both have the name.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all names and shapes fit."""
        return not (self.missing or self.unexpected or self.misshaped)

    def message(self) -> str:
        """Counts and the first few names of each kind, in one line; empty if all fits."""
        parts = []
        for kind in ("missing", "unexpected", "misshaped"):
            names: tuple[str, ...] = getattr(self, kind)
            if names:
                more = ", ..." if len(names) > _SHOWN else ""
                shown = ", ".join(map(printable, names[:_SHOWN]))
                parts.append(f"{len(names)} {kind} ({shown}{more})")
        return "; ".join(parts)


def match(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> KeyReport:
    """Compares names and shapes.

    Args:
        expected: State dict of the model.
        found: State dict of the file. It may lack batch norm's `num_batches_tracked`, which old
            files do not have and evaluation does not use.

    Returns:
        The differences, in the order of the two mappings.
    """
    return KeyReport(
        missing=tuple(
            name for name in expected if name not in found and not name.endswith(_COUNTER)
        ),
        unexpected=tuple(name for name in found if name not in expected),
        misshaped=tuple(
            f"{name}: {_form(found[name])} instead of {_form(tensor)}"
            for name, tensor in expected.items()
            if name in found and not _fits(tensor, found[name], any_kind=name.endswith(_COUNTER))
        ),
    )


def _fits(expected: Tensor, found: Tensor, *, any_kind: bool = False) -> bool:
    # Any precision will do, but whole numbers for weights are a quantised model.
    same_kind = any_kind or expected.is_floating_point() == found.is_floating_point()
    return expected.shape == found.shape and same_kind


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


@dataclass(frozen=True)
class Place:
    """Where names of a model are found in a state dict.

    Attributes:
        prefix: What stands before them; "" or with a dot at its end.
        spelling: Number of the spelling under which they are the model's.
        fits: How many have the shape of the model's too.
        names: How many there are.
    """

    prefix: str
    spelling: int
    fits: int
    names: int


def places(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    spellings: tuple[Spelling, ...] = (str,),
) -> list[Place]:
    """Finds under which prefixes a state dict holds names of a model.

    No prefix is known beforehand: each name is cut at each of its dots, and what remains is looked
    up. Only as many cuts are tried as the model's names are deep and long, so that time grows in
    proportion to the file.

    Args:
        found: State dict of the file.
        expected: State dict of the model.
        spellings: Ways to write the names.

    Returns:
        The places, in the order of the file and of the spellings.
    """
    depth = max((name.count(".") for name in expected), default=0) + 1 + _INSERTED
    longest = max(map(len, expected), default=0) * 2
    names: Counter[tuple[str, int]] = Counter()
    fits: Counter[tuple[str, int]] = Counter()
    for name, tensor in found.items():
        if name.endswith(_COUNTER):
            continue
        for start in _starts(name, depth, longest):
            for number, spell in enumerate(spellings):
                target = expected.get(spell(name[start:]))
                if target is not None:
                    key = (name[:start], number)
                    names[key] += 1
                    fits[key] += _fits(target, tensor)
    return [
        Place(prefix, number, fits[prefix, number], count)
        for (prefix, number), count in names.items()
    ]


def _starts(name: str, depth: int, longest: int) -> list[int]:
    """Where the last parts of a name begin, the whole name first."""
    starts: list[int] = []
    end = len(name)
    while end >= 0 and len(starts) < depth:
        end = name.rfind(".", max(0, len(name) - longest - 1), end)
        if end < 0 and len(name) > longest:
            break
        starts.append(end + 1)
    return starts[::-1]


def unwrap(found: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Takes a prefix off the names of a state dict.

    Args:
        found: State dict of the file.
        prefix: What the names of the model begin with.

    Returns:
        (inside, outside): the tensors under the prefix by the rest of their names, and those
        beside it by what follows the part that they share with the prefix.
    """
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in found.items()
        if name.startswith(prefix)
    }
    beside = [name for name in found if not name.startswith(prefix)]
    short = [name[len(shared_parts(name, prefix)) :] for name in beside]
    if len(set(short)) < len(short):
        short = beside  # two tensors never end under one name
    return inside, {new: found[name] for new, name in zip(short, beside, strict=True)}


def shared_parts(name: str, prefix: str) -> str:
    """What a name and a prefix begin with, up to and with a dot."""
    end = 0
    while (dot := prefix.find(".", end)) >= 0 and name.startswith(prefix[end : dot + 1], end):
        end = dot + 1
    return prefix[:end]
