"""The classes that a user can name in a command, and their arguments."""

import inspect
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

from bdclean.errors import in_a_sentence
from bdclean.plugins import ATTACKS, METHODS, load_plugins

ROOMS = {
    "bdclean.attacks": "data.attack",
    "bdclean.data": "data",
    "bdclean.purification": "model",
    "bdclean.sifting": "model",
    "bdclean.training": "model",
}
"""Rooms whose classes have short names, as `--model CBD`; and where these stand in a config."""

BASES = {
    "model": "lightning.pytorch.LightningModule",
    "data": "lightning.pytorch.LightningDataModule",
    "data.attack": "bdclean.attacks.Attack",
}
"""What the classes that a command takes are made from, by key; imported when it is needed."""

_ELSEWHERE = (
    *("torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks"),
    *("lightning.pytorch.loggers", "lightning.pytorch.profilers", "lightning.pytorch.strategies"),
)
"""Modules of others whose classes have short names too, as `--model.optimizer SGD`."""

_OF_KEYS = {
    "optimizer": "torch.optim",
    "callbacks": "lightning.pytorch.callbacks",
    "logger": "lightning.pytorch.loggers",
    "profiler": "lightning.pytorch.profilers",
    "strategy": "lightning.pytorch.strategies",
}
"""Which of these modules has the classes of an option, by the last part of its name."""

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


def others_of(key: str) -> list[str]:
    """Names of the classes of torch or Lightning that an option takes; empty for another one."""
    module = _OF_KEYS.get(key.rpartition(".")[2])
    found = {} if module is None else vars(import_module(module))
    return sorted(name for name, each in found.items() if inspect.isclass(each))


def base_of(key: str) -> type:
    """What the classes that stand at a key of `BASES` are made from."""
    base: type = find_class(BASES[key])
    return base


def find_class(name: str) -> Any:
    """What an import path names; None if there is no such thing."""
    module, _, last = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        return getattr(import_module(module), last, None)
    except Exception:  # whatever another module raises
        return None


def why_not_imported(name: str) -> str | None:
    """What the import of the module of a class raised, as a sentence; None if nothing of its own.

    Args:
        name: Import path of the class.
    """
    module = name.rpartition(".")[0]
    if not module or not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or f"{module}.".startswith(f"{error.name}."):
            return None
        return f"its module {module} cannot be imported. {in_a_sentence(error)}"
    except Exception as error:  # whatever another module raises
        return f"its module {module} cannot be imported. {type(error).__name__}: " + (
            in_a_sentence(error)
        )
    return None


def named_class(name: str, base: type | None) -> type | None:
    """The class that a user names, in short or by import path; None if there is none.

    Args:
        name: For example `CBD`, `SGD` or `mine.Method`.
        base: What it must be made from; None takes any class, those of torch and Lightning too.
    """
    found: Any = None if base is None else classes_of(base).get(name)
    found = found or find_class(name)
    if base is None and found is None:
        rooms = [vars(import_module(room)) for room in (*ROOMS, *_ELSEWHERE)]
        found = next((room[name] for room in rooms if name in room), None)
    fits = isinstance(found, type) and (base is None or issubclass(found, base))
    return found if fits else None


def name_of(kind: type, base: type | None) -> str:
    """What a user types for a class: its short name, if that is known, or else its import path."""
    short = kind.__name__
    return short if named_class(short, base) is kind else f"{kind.__module__}.{kind.__qualname__}"


def arguments_of(kind: type) -> list[str]:
    """Dotted names of the arguments of a class, those of its groups among them."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, fail_untyped=False)
    return list(parser.get_defaults().keys())


def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of the arguments of a class by their dotted names, as `arguments_of`."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, fail_untyped=False)
    found = {each.dest: vars(each) for each in vars(parser)["_actions"]}
    return {name: each.get("_typehint", each.get("basetype")) for name, each in found.items()}


def _is_one(each: Any, base: type) -> bool:
    return inspect.isclass(each) and issubclass(each, base) and not inspect.isabstract(each)
