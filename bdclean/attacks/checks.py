"""Argument checks that all attacks share: one sentence with key, value and what is allowed."""

import math
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

from torch import Tensor

from bdclean.errors import AttackError

NAMED = "name:"
"""Begins a class that is meant by its name, although the name looks like a number."""

LabelRule = Literal["all_to_one", "all_to_all", "clean_label"]
"""What happens to the label of a poisoned row: becomes the target; (y + 1) mod C; stays."""

RateBase = Literal["dataset", "target_class", "source_class"]
"""What the poison rate is a share of; "source_class" only where an attack has one."""

Quantize = Literal["round", "floor", "none"]
"""How triggered pixels go back to 8 bits; "none" keeps floats, which uint8 cannot store."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raises an AttackError unless `condition` holds.

    Args:
        condition: Whether the value is allowed.
        key: The attack's argument, without a prefix.
        value: What was given.
        allowed: What would have been right, as the end of "it must be ...".
    """
    if not condition:
        raise AttackError(f"{key}={value}: it must be {allowed}.")


def returned(attack: object, method: str, value: Any, kind: type[Any]) -> Any:
    """What a method of a user's own attack returned, if it is of the right kind.

    Raises:
        AttackError: It is not.
    """
    if not isinstance(value, kind):
        raise AttackError(
            f"{type(attack).__name__}: {method}() must return a {kind.__name__}, and it returned "
            f"{value!r:.80}."
        )
    return value


def require_choice(key: str, value: object, literal: object) -> None:
    """Raises an AttackError unless `value` is one of the values of a Literal type."""
    choices = get_args(literal)
    require(value in choices, key, value, "one of " + ", ".join(map(str, choices)))


def require_integer(key: str, value: object, minimum: int) -> None:
    """Raises an AttackError unless `value` is an integer of at least `minimum`."""
    require(is_integer(value, minimum), key, value, f"an integer >= {minimum}")


def require_size(size: Sequence[int]) -> tuple[int, int]:
    """Returns (height, width); raises an AttackError unless `size` is that, in pixels."""
    pair = isinstance(size, Sequence) and len(size) == 2
    fits = pair and all(is_integer(side, 1) for side in size)
    require(fits, "size", size, "(height, width), two integers >= 1")
    height, width = size
    return height, width


def check_class(key: str, value: int | str) -> int:
    """A class as an attack's argument: a label, or a name until `Attack.name_classes`.

    Raises:
        AttackError: It is neither a whole number from 0 nor a name.
    """
    allowed = "an integer >= 0, or the name of a class"
    require(is_integer(value, 0) or (isinstance(value, str) and value != ""), key, value, allowed)
    return cast(int, value)


def labelled(key: str, value: int | str, names: Sequence[str]) -> int:
    """The label of a class that may be given by its name, or by `name:NAME`.

    Raises:
        AttackError: The data set has no class of that name.
    """
    if not isinstance(value, str):
        return value
    name = value.removeprefix(NAMED)
    require(bool(names), key, value, "an integer >= 0, since the classes here have no names")
    near = get_close_matches(name, names, 1) or names[:1]
    known = f"a class of the data set, such as {near[0]}"
    require(name in names, key, value, known)
    return list(names).index(name)


def warn_of_numbers(target: int | str | None, names: Sequence[str]) -> None:
    """Folders 0, 1, 10, 2 are sorted as text: label 2 is the folder 10."""
    if not isinstance(target, int) or target >= len(names) or str(target) not in names:
        return
    if names[target] != str(target):
        warnings.warn(
            f"target={target}: this label is the class named {names[target]}, since names are "
            f"sorted as text; for the class named {target} set target to {NAMED}{target}.",
            stacklevel=4,
        )


def checked_labels(labels: Tensor, num_classes: int) -> Tensor:
    """A copy of labels (N,) on the CPU, int64.

    Raises:
        AttackError: They are no vector of integers, or do not fit the number of classes.
    """
    require_integer("num_classes", num_classes, 2)
    if labels.dim() != 1 or labels.is_floating_point() or not len(labels):
        raise AttackError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; an attack needs "
            "a non-empty vector of integers."
        )
    labels = labels.detach().cpu().long().clone()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise AttackError(
            f"labels lie in [{low}, {high}]; with {num_classes} classes they must lie in "
            f"[0, {num_classes - 1}]."
        )
    return labels


def require_class(key: str, value: int, num_classes: int) -> None:
    """Raises an AttackError unless `value` is a class of the data set."""
    require(not isinstance(value, str), key, value, "an integer >= 0, before classes have names")
    allowed = f"in [0, {num_classes - 1}] for a data set of {num_classes} classes"
    require(0 <= value < num_classes, key, value, allowed)


def require_share(key: str, value: float) -> None:
    """Raises an AttackError unless `value` lies in [0, 1]."""
    require(is_between(value, 0, 1), key, value, "in [0, 1]")


def is_between(value: float, low: float, high: float) -> bool:
    """Whether a finite number lies in [low, high]."""
    return math.isfinite(value) and low <= value <= high


def is_integer(value: object, minimum: int) -> bool:
    """Whether `value` is an integer, not a truth value, of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
