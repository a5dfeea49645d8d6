"""A user's own modules: found in the current folder, and only those that a class path names.

The current folder is on no search path. A stray file in it, as `tabulate.py` of a download, would
run with every command otherwise, as soon as some library tries to import that name.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from itertools import accumulate
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from bdclean.errors import in_a_sentence

_VARIABLE = "BDCLEAN_OWN_MODULES"
"""Holds the names for processes that a run starts, as the workers of a data loader."""
_CLASS_PATH = re.compile(
    r"(?<![\w.:/\\-])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.[A-Za-z_]\w*(?![\w/\\-])"
)
_NETWORK = re.compile(
    r"(?<![\w.:/\\-])(?!(?:torchvision|timm|solo):)"
    r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*(?![\w/\\:-])"
)
"""A network of the user's own, as `--model.arch` names it: MODULE:NAME."""


class _Named(MetaPathFinder):
    """Finds top-level modules of a folder by these names, where no other finder has them.

    Attributes:
        names: Of the top-level modules.
        folder: Where they lie; the current folder when the words were read, since jsonargparse
            changes it.
        modules: Those that class paths name, with dots.
        own: Names of those that were found.
        failed: What the import of one raised, as a sentence.
    """

    def __init__(self) -> None:
        self.names = set(os.environ.get(_VARIABLE, "").split())
        self.folder = Path.cwd()
        self.modules: set[str] = set()
        self.own: set[str] = set()
        self.failed: str | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        """Python's question for a module."""
        top = name.partition(".")[0]
        if top not in (self.names if path is None else self.own):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        if path is None and any(finder.find_spec(name, None) for finder in others):
            return None
        spec = PathFinder.find_spec(name, [str(self.folder)] if path is None else path)
        if spec is not None:
            self.own.add(top)
            if spec.loader is not None and name in self.modules:
                spec.loader = _Told(spec.loader, self)
        return spec


class _Told(Loader):
    """Loads a module, and keeps what its import raises, which jsonargparse would hide."""

    def __init__(self, loader: Loader, finder: _Named) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As Python's."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As Python's.

        Raises:
            ImportError: If the module raises anything, `SystemExit` too.
        """
        try:
            self._loader.exec_module(module)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):  # of the user
                raise
            file, trace = str(module.__file__), extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in trace if frame.filename == file]
            where = f" in line {lines[-1]}" if lines else ""
            raised = f"{type(error).__name__}{where}: {error}".rstrip(": ")
            self._finder.failed = (
                f"The module {module.__name__} was found ({Path(file).name}), but its import "
                f"raised {in_a_sentence(raised)}"
            )
            raise ImportError(self._finder.failed) from error


_FINDER = _Named()
if _FINDER.names:  # a process that a run started
    sys.meta_path.insert(0, _FINDER)


def allow(settings: Any) -> None:
    """Lets modules be imported from the current folder that class paths or networks name.

    Args:
        settings: Words of a command, or the content of a config, nested in any way.
    """
    forms = (_CLASS_PATH, _NETWORK)
    found = {m[1] for text in _texts(settings) for form in forms for m in form.finditer(text)}
    _FINDER.folder, _FINDER.failed = Path.cwd(), None
    _FINDER.modules |= {module for path in found for module in accumulate(path.split("."), _dotted)}
    tops = {path.partition(".")[0] for path in found}
    if tops - _FINDER.names:
        _FINDER.names |= tops
        os.environ[_VARIABLE] = " ".join(sorted(_FINDER.names))
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def failure() -> str | None:
    """What the import of such a module raised since the words were read, as a sentence."""
    return _FINDER.failed


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}"


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
