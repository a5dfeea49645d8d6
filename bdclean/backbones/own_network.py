"""Networks of the user's own: `arch` is MODULE:NAME, with (ARGUMENTS) and @HEAD where needed.

NAME is a class or function that returns an `nn.Module` from images (B, 3, H, W) to logits. Code is
imported by `name_network` alone, which gets the user's words; what a file says is looked up among
the networks that were named so, and never imported.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bdclean.backbones.apart import Apart, take_apart
from bdclean.errors import ConfigError, in_a_sentence, in_words

LIBRARIES = ("torchvision", "timm", "solo")
"""What stands before the colon in other names."""
IN_MEMORY = "in memory:"
"""Begins the `arch` of a network that the user holds as an object: no name of any code."""

_FORM = re.compile(
    r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)"
    r"(?P<arguments>\(.*\))?(?:@(?P<head>[\w.]+))?",
    re.DOTALL,
)
_LONGEST = 400  # characters; the metadata of a file holds it
_WAY_OUT = "arch is MODULE:NAME, with arguments MODULE:NAME(depth=3), with a named head @fc"


@dataclass(frozen=True)
class _Named:
    """A network that the user has named.

    Attributes:
        create: Makes it.
        head: Name of its classifier; None finds it.
    """

    create: Callable[[], Any]
    head: str | None


_NETWORKS: dict[str, _Named] = {}
"""Those that the user has named in this process, by their whole `arch`."""


def is_own_network(arch: str) -> bool:
    """Whether an `arch` has the form of a network of the user's own."""
    found = _FORM.fullmatch(arch)
    return found is not None and found["module"] not in LIBRARIES


def is_named(arch: str) -> bool:
    """Whether the user has named this network in this process, so that it can be made."""
    return arch in _NETWORKS


def place_of(arch: str) -> str:
    """MODULE:NAME of such a network, without what follows."""
    return arch.partition("(")[0].partition("@")[0]


def name_network(arch: str | None) -> None:
    """Imports a network that the user names; other names are left alone.

    Never to be called with what a file says.

    Args:
        arch: As the user typed it.

    Raises:
        ConfigError: If there is no such module, class or function, or it needs other arguments.
    """
    found = None if arch is None else _FORM.fullmatch(arch)
    if arch is None or found is None or not is_own_network(arch) or arch in _NETWORKS:
        return
    if len(arch) > _LONGEST:
        raise ConfigError(
            f"arch={arch[:40]!r}... has {len(arch)} characters, and {_LONGEST} are allowed; write "
            "a function that gives these arguments."
        )
    create = _imported(arch, found["module"], found["name"])
    args, kwargs = _arguments(arch, found["arguments"] or "()")
    try:
        inspect.signature(create).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"arch={arch!r}: {in_words(error)}; arguments stand in brackets, as in "
            f"{place_of(arch)}(depth=3)."
        ) from error
    except ValueError:  # it tells nothing of its arguments
        pass
    _NETWORKS[arch] = _Named(lambda: create(*args, **kwargs), found["head"])


def _imported(arch: str, module: str, name: str) -> Callable[..., Any]:
    try:
        with _settings_kept():
            holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _import_failed(arch, module, error) from error
        raise ConfigError(
            f"arch={arch!r} is unknown: there is no module {error.name}, neither in the current "
            f"folder nor installed. {_WAY_OUT}."
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module does, SystemExit too
        raise _import_failed(arch, module, error) from error
    found: Any = getattr(holder, name, None)
    if isinstance(found, nn.Module):
        raise ConfigError(
            f"arch={arch!r}: {name} is a network that has been made already; name its class, or a "
            "function that returns it."
        )
    if not callable(found):
        there = f"{name} is of the type {type(found).__name__}" if hasattr(holder, name) else None
        raise ConfigError(
            f"arch={arch!r}: {there or f'the module {module} has no {name}'}; name a class or "
            "function that returns a torch.nn.Module."
        )
    create: Callable[..., Any] = found
    return create


@contextmanager
def _settings_kept(*, numbers: bool = True) -> Iterator[None]:
    """Keeps what code of the user's may set for all of torch, and a training relies on.

    Args:
        numbers: Whether random numbers go on as if that code had drawn none.
    """
    gradients, kind, drawn = torch.is_grad_enabled(), torch.get_default_dtype(), None
    if numbers:
        drawn = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(kind)
        if drawn is not None:
            torch.set_rng_state(drawn)


def _import_failed(arch: str, module: str, error: BaseException) -> ConfigError:
    said = str(error) if isinstance(error, ImportError) else ""
    if not said.startswith("The module "):  # as the command line tells of the current folder
        said = f"the import of {module} raised {type(error).__name__}: {error}".rstrip(": ")
    return ConfigError(f"arch={arch!r}: {in_a_sentence(said)}")


def _arguments(arch: str, text: str) -> tuple[Sequence[Any], Mapping[str, Any]]:
    refused = ConfigError(
        f"arch={arch!r}: arguments must be plain values such as (depth=3, name='wide')."
    )
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise refused
        args = [ast.literal_eval(each) for each in call.args]
        kwargs = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise refused from error
    return args, kwargs


def make_own_network(arch: str, input_size: int) -> Apart:
    """Makes a network that the user has named, and takes its classifier out.

    Args:
        arch: As the user named it.
        input_size: Side of the images in pixels; a batch of two is passed.

    Raises:
        ConfigError: If the user has not named it, or it is no classifier that ends in a linear
            layer.
    """
    named = _NETWORKS.get(arch)
    if named is None:
        raise ConfigError(
            f"{place_of(arch)} is code of somebody's own, and no file makes bdclean import code; "
            "name your module with arch"
        )
    parts = take_apart(make_whole(arch).cpu(), f"arch={arch!r}", input_size, named.head)
    parts.backbone.train()
    return parts


def make_whole(arch: str) -> nn.Module:
    """Makes a network that the user has named.

    Raises:
        ConfigError: If that is no network.
    """
    try:
        with _settings_kept(numbers=False):
            made = _NETWORKS[arch].create()
    except Exception as error:  # whatever the user's code does
        raise ConfigError(
            f"arch={arch!r}: making it raised {type(error).__name__}: {in_words(error)}."
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"arch={arch!r}: it gives a {type(made).__name__}; it must give a torch.nn.Module."
        )
    return made


def lines_of(arch: str) -> list[str]:
    """Lines of Python that make such a network, whoever named it, as `network`."""
    found = _FORM.fullmatch(arch)
    assert found is not None  # noqa: S101
    return [
        f"from {found['module']} import {found['name']}",
        f"network = {found['name']}{found['arguments'] or '()'}",
    ]
