"""Names of a weights file against the names of a model."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from bdclean.printable import printable

_WRAPPERS = ("module", "model", "backbone", "encoder", "encoder_q", "base_encoder")
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
            name
            for name in expected
            if name not in found and not name.endswith("num_batches_tracked")
        ),
        unexpected=tuple(name for name in found if name not in expected),
        misshaped=tuple(
            f"{name}: {_form(found[name])} instead of {_form(tensor)}"
            for name, tensor in expected.items()
            if name in found and not _fits(tensor, found[name])
        ),
    )


def _fits(expected: Tensor, found: Tensor) -> bool:
    # Any precision will do, but whole numbers for weights are a quantised model.
    same_kind = expected.is_floating_point() == found.is_floating_point()
    return expected.shape == found.shape and same_kind


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def unwrap(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Takes the wrappers' prefixes off the names of a foreign state dict.

    Wrappers are `module.`, `model.`, `backbone.`, `encoder.`, and MoCo's `encoder_q.` and
    `base_encoder.`, in any combination, as data parallel training and self-supervised libraries
    put them. The prefix under which most names
    of the model are found is the one that holds it.

    Args:
        found: State dict of the file.
        expected: State dict of the backbone.

    Returns:
        The tensors under the prefix and those beside it, by bare names: (inside, outside).
    """
    votes = Counter(prefix for name in found for prefix, rest in _splits(name) if rest in expected)
    prefix = votes.most_common(1)[0][0] if votes else ""
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in found.items()
        if name.startswith(prefix)
    }
    beside = [name for name in found if not name.startswith(prefix)]
    short = [bare(name)[1] for name in beside]
    if len(set(short)) < len(short):
        short = beside  # two tensors never end under one name
    outside = {new: found[name] for new, name in zip(short, beside, strict=True)}
    return inside, outside


def bare(name: str) -> tuple[str, str]:
    """All leading wrapper names, and the rest."""
    return list(_splits(name))[-1]


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """("", name), then each way to cut off leading wrapper names."""
    prefix, rest = "", name
    yield prefix, rest
    while "." in rest and rest.split(".")[0] in _WRAPPERS:
        wrapper, rest = rest.split(".", 1)
        prefix += f"{wrapper}."
        yield prefix, rest
