"""The state dicts in what a torch file holds, wherever they lie in it."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 8  # levels of containers
_CONTAINERS = 10_000  # that are looked at; an optimizer holds one for each parameter
_ITEMS = 100  # of a list
_SHOWN = 80  # characters of a key
_EXTRA = "_extra_state"  # what PyTorch calls an entry for anything that a layer keeps beside


@dataclass(frozen=True)
class Nest:
    """One dict of tensors.

    Attributes:
        where: Keys that lead to it, joined by dots; "" for the whole file.
        tensors: Its plain tensors by name.
        others: Names of its entries that are no plain tensors.
        keys: Those that lead to it, whole; a number is the place in a list.
    """

    where: str
    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()
    keys: tuple[str | int, ...] = ()


def find_nests(content: Any) -> list[Nest]:
    """All dicts that hold a tensor, the outer ones first.

    Takes time in proportion to the file, whatever it holds: a dict is looked at once, to a depth
    of 8 levels, and not where a key is no text (the state of an optimizer).
    """
    waiting: deque[tuple[str, tuple[str | int, ...], Any]] = deque([("", (), content)])
    seen: set[int] = set()
    found = []
    while waiting and len(seen) < _CONTAINERS:
        where, keys, value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping) and (nest := _nest(where, keys, value)) is not None:
            found.append(nest)
        if len(keys) < _DEPTH:
            waiting.extend(
                (f"{where}.{str(key)[:_SHOWN]}".lstrip("."), (*keys, key), inner)
                for key, inner in _inner(value)
            )
    return found


def _nest(where: str, keys: tuple[str | int, ...], content: Mapping[Any, Any]) -> Nest | None:
    if not any(isinstance(value, Tensor) for value in content.values()):
        return None
    if not all(isinstance(key, str | int | bytes) for key in content):
        return None
    tensors = {name_of(key): value for key, value in content.items() if _is_plain(value)}
    others = tuple(name_of(key) for key in content if name_of(key) not in tensors)
    kept = {name: tensor for name, tensor in tensors.items() if not _is_extra(name)}
    return Nest(where, kept, tuple(name for name in others if not _is_extra(name)), keys)


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA


def name_of(key: object) -> str:
    """The text of a key, or of another one its kind: its text could be endless."""
    return str(key) if isinstance(key, str | int | bytes) else f"a {type(key).__name__}"


def _inner(content: Any) -> Iterator[tuple[str | int, Any]]:
    """Containers in a container."""
    pairs: Iterator[tuple[str | int, Any]]
    if isinstance(content, Mapping):
        pairs = ((key, value) for key, value in content.items() if isinstance(key, str))
    elif isinstance(content, list | tuple):
        pairs = enumerate(content[:_ITEMS])
    else:
        return
    yield from (pair for pair in pairs if isinstance(pair[1], Mapping | list | tuple))


def _is_plain(value: object) -> bool:
    """Whether it is a tensor of numbers, without attributes that hide its methods."""
    if type(value) not in (Tensor, nn.Parameter) or vars(value):
        return False
    assert isinstance(value, Tensor)  # noqa: S101  (for mypy)
    odd = value.is_nested or value.is_quantized or value.is_meta
    return not odd and value.layout == torch.strided
