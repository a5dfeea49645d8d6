"""What an argument may be, in words, from its annotation: `a list of numbers or null`."""

import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from bdclean.commands.rooms import find_class, hints_of

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true, false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "set": "a list",
    "dict": "a mapping",
    "Mapping": "a mapping",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number, 0 or above",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number, 0 or above",
}
"""By the name of a type."""
_MANY = {int: "whole numbers", float: "numbers", str: "words", bool: "true and false"}
_OWNERS = {
    "trainer": "lightning.pytorch.Trainer",
    "checkpoint": "lightning.pytorch.callbacks.ModelCheckpoint",
}


def allowed_for(key: str, owner: str | None) -> list[str]:
    """What an argument may be; empty where that is not known, or where a class may be named.

    Args:
        key: Its dotted name, within the class where there is one: `recipe.milestones`.
        owner: Import path of the class; None takes what the first part of `key` is made from.
    """
    if owner is None:
        section, _, key = key.partition(".")
        owner = _OWNERS.get(section)
    kind = None if owner is None else find_class(owner)
    hint = hints_of(kind).get(key) if isinstance(kind, type) else None
    return [] if hint is None else in_words(hint)


def in_words(hint: Any) -> list[str]:
    """The alternatives that an annotation allows; empty if one of them has no words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [str(each) for each in arguments]
    if origin in (Union, types.UnionType):
        parts = [in_words(each) for each in arguments]
        words = [word for part in parts for word in part] if all(parts) else []
        return list(dict.fromkeys(words))
    if isinstance(origin, type) and issubclass(origin, Collection):
        return [_list_of(arguments, origin)]
    word = WORDS.get(getattr(hint, "__name__", ""))
    return [] if word is None else word.split(", ") if hint is bool else [word]


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _list_of(arguments: tuple[Any, ...], origin: type) -> str:
    if issubclass(origin, Mapping):
        return "a mapping"
    many = _MANY.get(arguments[0]) if arguments else None
    fixed = origin is tuple and Ellipsis not in arguments
    count = f"{len(arguments)} " if fixed else ""
    return f"a list of {count}{many}" if many else "a list"
