"""Classes of other packages, found through entry points.

A package declares them in its pyproject.toml, and `--model NAME` or `--data.attack NAME` finds
them as it finds ours:

    [project.entry-points."bdclean.methods"]
    Mine = "my_package.my_module:Mine"
"""

import warnings
from importlib.metadata import entry_points
from typing import Any

GROUPS = ("bdclean.attacks", "bdclean.methods")


def load_plugins(group: str) -> dict[str, Any]:
    """Imports what other packages declare under a group.

    What cannot be imported is left out with a warning, so that one broken package spoils no
    command.

    Args:
        group: One of `GROUPS`.

    Returns:
        What was imported, by the declared names.
    """
    found = {}
    for entry in entry_points(group=group):
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            warnings.warn(
                f"The entry point {entry.name} = {entry.value} of the group {group} cannot be "
                f"imported ({error}) and is left out.",
                stacklevel=2,
            )
    return found
