"""A user's own modules: found in the current folder, and only those that a class path names.

The current folder is on no search path. A stray file in it, as `tabulate.py` of a download, would
run with every command otherwise, as soon as some library tries to import that name.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_VARIABLE = "BDCLEAN_OWN_MODULES"
"""Holds the names for processes that a run starts, as the workers of a data loader."""
_CLASS_PATH = re.compile(r"(?<![\w.:/\\-])([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+(?![\w/\\-])")


class _Named(MetaPathFinder):
    """Finds top-level modules of the current folder by these names; asked after all others."""

    def __init__(self) -> None:
        self.names = set(os.environ.get(_VARIABLE, "").split())

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        """Python's question for a module."""
        if path is not None or name not in self.names:
            return None
        return PathFinder.find_spec(name, [str(Path.cwd())])


_FINDER = _Named()
if _FINDER.names:  # a process that a run started
    sys.meta_path.append(_FINDER)


def allow(settings: Any) -> None:
    """Lets modules be imported from the current folder that class paths name.

    Args:
        settings: Words of a command, or the content of a config, nested in any way.
    """
    found = {match[1] for text in _texts(settings) for match in _CLASS_PATH.finditer(text)}
    if found - _FINDER.names:
        _FINDER.names |= found
        os.environ[_VARIABLE] = " ".join(sorted(_FINDER.names))
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for value in settings:
            yield from _texts(value)
    elif isinstance(settings, str) and not _is_file(settings):
        yield settings


def _is_file(value: str) -> bool:
    with suppress(OSError, ValueError):  # no file has such a name
        return Path(value).exists()
    return False
