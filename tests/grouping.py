"""Modules from nested settings: groups of arguments as dictionaries of what differs."""

import inspect
from dataclasses import fields, is_dataclass, replace
from typing import get_args, get_type_hints


def merged(*layers):
    """Later layers win, key by key."""
    result = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def takes(kind, argument):
    """Whether a constructor has the argument, or forwards it to one that has."""
    constructors = [vars(each).get("__init__") for each in kind.__mro__]
    return any(argument in inspect.signature(each).parameters for each in constructors if each)


def make_of(kind, *layers):
    """An object of `kind`; dictionaries change the defaults of its groups."""
    hints = get_type_hints(kind.__init__)
    parameters = inspect.signature(kind.__init__).parameters
    settings = merged(*layers)
    for name, value in settings.items():
        if isinstance(value, dict) and name in parameters:
            settings[name] = _group(parameters[name].default, hints[name], value)
    return kind(**settings)


def _group(default, hint, changes):
    if default is None or not is_dataclass(default):
        default = next(kind for kind in get_args(hint) if is_dataclass(kind))()
    nested = {f.name: getattr(default, f.name) for f in fields(default)}
    changed = {
        name: _group(nested[name], type(nested[name]), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return replace(default, **changed)
