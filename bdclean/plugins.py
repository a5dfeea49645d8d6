"""Classes of other packages, which the command line finds by name as it finds ours.

A package offers them as entry points, in its `pyproject.toml`:

    [project.entry-points."bdclean.attacks"]
    Stripes = "stripes:Stripes"
"""

import sys
import warnings
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points

from bdclean.printable import printable

ATTACKS = "bdclean.attacks"
"""Group of the entry points that are attacks."""
METHODS = "bdclean.methods"
"""Group of the entry points that are methods."""


def load_plugins(group: str) -> dict[str, type]:
    """Imports the classes that installed packages offer; one that fails is left out.

    Args:
        group: Of the entry points.

    Returns:
        The classes by the names of their entry points.
    """
    found: dict[str, type] = {}
    for point in _points(group, tuple(sys.path)):
        try:
            found[point.name] = _class(point.load())
        except (Exception, SystemExit) as error:  # whatever another package does
            reason = printable(f"{type(error).__name__}: {error}").rstrip(".")
            warnings.warn(
                f"{point.name} is left out: the entry point {point.value!r} of {group}, of the "
                f"package {_package(point)}, cannot be imported ({reason}).",
                stacklevel=2,
            )
    return found


@cache
def _points(group: str, path: tuple[str, ...]) -> EntryPoints:
    """Those of a group; a command asks ten times, and each time all packages are looked through."""
    return entry_points(group=group)


def _package(point: EntryPoint) -> str:
    return "?" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _class(loaded: object) -> type:
    if not isinstance(loaded, type):
        raise TypeError(f"{loaded!r} is no class")
    return loaded
