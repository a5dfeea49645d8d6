"""The classes that a user can name in a command, and their arguments."""

import inspect
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

from bdclean.plugins import ATTACKS, METHODS, load_plugins

ROOMS = {
    "bdclean.attacks": "data.attack",
    "bdclean.data": "data",
    "bdclean.purification": "model",
    "bdclean.sifting": "model",
    "bdclean.training": "model",
}
"""Rooms whose classes have short names, as `--model CBD`; and where these stand in a config."""

KEYS = ROOMS | {"bdclean.modules": "model"}
"""What an error is about, by the room that it comes from."""


def import_rooms() -> None:
    """Imports all rooms: jsonargparse finds short names among the classes that are there."""
    for room in ROOMS:
        import_module(room)
    load_plugins(ATTACKS)
    load_plugins(METHODS)


def classes_of(base: type) -> dict[str, type]:
    """The classes below `base` that the rooms offer, by their names."""
    offered = [vars(import_module(room)) for room in ROOMS]
    offered += [load_plugins(group) for group in (ATTACKS, METHODS)]
    found = {name: each for room in offered for name, each in room.items() if _is_one(each, base)}
    return dict(sorted(found.items()))


def find_class(name: str) -> Any:
    """What an import path names; None if there is no such thing."""
    module, _, last = name.rpartition(".")
    try:
        return getattr(import_module(module), last, None)
    except (ImportError, ValueError):
        return None


def arguments_of(kind: type) -> list[str]:
    """Dotted names of the arguments of a class, those of its groups among them."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, fail_untyped=False)
    return list(parser.get_defaults().keys())


def _is_one(each: Any, base: type) -> bool:
    return inspect.isclass(each) and issubclass(each, base) and not inspect.isabstract(each)
