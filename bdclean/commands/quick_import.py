"""Imports Lightning without what its own imports load for others.

Lightning imports all of torchmetrics to read its version. torchmetrics imports matplotlib, to
offer plots of metrics, and scipy.signal, to give back a name that another package misses. No
command uses either of them that way, and together they take a quarter of the time until a command
reads its first option.
"""

import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import ModuleType

from bdclean import stopping

_PLOTS = "matplotlib"
_SIGNAL = "scipy.signal"


class _NoPlots(DistributionFinder):
    """Says that matplotlib is not installed, which torchmetrics asks before it imports it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """Python's question for a module."""
        if name.partition(".")[0] == _PLOTS:
            raise ModuleNotFoundError(name, name=name)

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        """Python's question for an installed package."""
        if context is not None and context.name == _PLOTS:
            raise PackageNotFoundError(_PLOTS)
        return iter(())


@contextmanager
def _without_extras() -> Iterator[None]:
    finder, stand_in, collecting = _NoPlots(), ModuleType(_SIGNAL), gc.isenabled()
    vars(stand_in)["hamming"] = None  # the name that torchmetrics looks for
    sys.meta_path.insert(0, finder)
    sys.modules[_SIGNAL] = stand_in
    gc.disable()  # nearly all that an import makes stays; looking through it takes half a second
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        del sys.modules[_SIGNAL]  # the next import gets the real one
        gc.freeze()  # nor does a later collection, or the one at exit, look through it
        if collecting:
            gc.enable()


@contextmanager
def told_if_slow(seconds: float = 5.0) -> Iterator[None]:
    """Says on a terminal that imports go on, where they take longer than one expects."""
    text = "loading torch and Lightning, which takes a while on a busy machine ..."
    timer = threading.Timer(seconds, stopping.tell, [text])
    timer.daemon = True
    if sys.stderr is not None and sys.stderr.isatty() and stopping.is_first():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def import_lightning() -> None:
    """Imports Lightning; does nothing where parts of it are imported already."""
    if {"torchmetrics", _PLOTS, _SIGNAL} & set(sys.modules):
        return
    with _without_extras():
        import lightning.pytorch  # noqa: F401
