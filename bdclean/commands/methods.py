"""`bdclean methods`: every method, and what it needs."""

from collections.abc import Iterator, Sequence
from inspect import isabstract
from types import ModuleType
from typing import TypeGuard

from rich.console import Console
from rich.table import Table

import bdclean.purification
import bdclean.sifting
import bdclean.training
from bdclean.commands.help_page import in_reach, page
from bdclean.errors import ConfigError
from bdclean.modules import BackdoorModule
from bdclean.plugins import METHODS, load_plugins

ROOMS: tuple[tuple[str, ModuleType], ...] = (
    ("purify", bdclean.purification),
    ("sift", bdclean.sifting),
    ("train", bdclean.training),
)

_DOES = (
    "Lists the methods of bdclean and of installed packages, and which labels and images each "
    "needs. A class in a file of your own is not listed; --model FILE.CLASS finds it."
)


def methods() -> Iterator[tuple[str, type[BackdoorModule]]]:
    """All methods of the package and of other packages, each with its kind."""
    for kind, room in ROOMS:
        for found in vars(room).values():
            if is_method(found):
                yield kind, found
    for found in load_plugins(METHODS).values():
        if is_method(found):
            yield "plugin", found


def is_method(found: object) -> TypeGuard[type[BackdoorModule]]:
    """Whether it is a class that can be fitted or tested."""
    return isinstance(found, type) and issubclass(found, BackdoorModule) and not isabstract(found)


def run_methods(words: Sequence[str]) -> None:
    """The command.

    Args:
        words: After `bdclean methods`; none are taken.

    Raises:
        ConfigError: If there are any.
    """
    if set(words) & {"-h", "--help"}:
        print(page("bdclean methods", _DOES, (), "bdclean methods", "docs/index.md"))
        return
    if words:
        named = {method.__name__.lower(): method.__name__ for _, method in methods()}
        known = named.get(words[0].lower())
        hint = f" `bdclean fit --model.help {known}` shows the options of {known}." if known else ""
        raise ConfigError(
            f"methods: {words[0]!r} is not expected; the command takes no arguments.{hint}"
        )
    columns: dict[str, list[str]] = {}
    for kind, method in methods():
        needs = method.needs
        row = {
            "kind": kind,
            "--model": method.__name__,
            "labels": needs.labels_name,
            "images": needs.images,
            "head": "needed" if needs.head else "",
            "batch norm": "needed" if needs.batch_norm else "",
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    shown = {name: values for name, values in columns.items() if any(values)}
    table = Table(*shown)
    for values in zip(*shown.values(), strict=True):
        table.add_row(*values)
    Console(width=100).print(table)  # wide enough for the names, which are typed
    print("`bdclean fit --model.help CBD` shows the options of one. The words are explained in")
    print(f"{in_reach('docs/concepts.md')}.")
