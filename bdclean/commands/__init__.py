"""The commands of `bdclean`: one file a verb, and the table of all of them.

Nothing heavy is imported here; a command's module is imported when the command runs.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from bdclean import shipped
from bdclean.commands.quick_import import import_lightning


class Command(NamedTuple):
    """A command, as the help shows it and as it is found.

    Attributes:
        place: `module:function` of a function that takes the words after the command's name.
        does: What it does, in one line.
        trains: Whether it needs Lightning, which takes seconds to import.
    """

    place: str
    does: str
    trains: bool = True

    def load(self) -> Callable[[Sequence[str]], object]:
        """Imports the function."""
        if self.trains:
            import_lightning()
        module, _, name = self.place.partition(":")
        function: Callable[[Sequence[str]], object] = getattr(import_module(module), name)
        return function


TRAINER = {
    "fit": Command("bdclean.commands.lightning:fit", "Train, purify or sift, then measure."),
    "validate": Command("bdclean.commands.lightning:validate", "Measure on held-out images."),
    "test": Command("bdclean.commands.lightning:test", "Measure a model without training it."),
    "predict": Command("bdclean.commands.lightning:predict", "Write features and logits."),
}
"""Commands of Lightning's Trainer: `bdclean fit -c FILE ... --KEY VALUE ...`."""

OWN = {
    "demo": Command("bdclean.commands.demo:run_demo", "The whole story on digits, in minutes."),
    "check": Command("bdclean.commands.check:run_check", "Is a model backdoored? Without labels."),
    "purify": Command(
        "bdclean.commands.purify:run_purify", "Clean a model with unlabelled images."
    ),
    "sift": Command("bdclean.commands.sift:run_sift", "Find poisoned images in a labelled folder."),
    "weights": Command(
        "bdclean.commands.weights:run_weights", "What a weights file is; other formats of it."
    ),
    "attack": Command("bdclean.commands.attack:run_attack", "Show or write poisoned images."),
    "figure": Command("bdclean.commands.figure:run_figure", "Draw the pictures of the papers."),
    "methods": Command("bdclean.commands.methods:run_methods", "List all methods and their needs."),
    "config": Command(
        "bdclean.commands.config:run_config", "List, show or copy the configs.", trains=False
    ),
}
"""Commands of this package. A new one is one file in this folder and one line here."""

COMMANDS = TRAINER | OWN


def overview() -> str:
    """The help of `bdclean`: all commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: bdclean COMMAND [options]", "       bdclean --version", ""]
    for title, commands in (
        ("Train and measure, from config files:", TRAINER),
        ("Other commands:", OWN),
    ):
        lines += [title, *(f"  {name:{width}}  {each.does}" for name, each in commands.items()), ""]
    lines += ["`bdclean COMMAND --help` shows the options of a command.", ""]
    lines += ["Example: bdclean demo --run runs/demo", ""]
    lines += [f"More: {shipped.page('docs/getting_started.md')}"]
    return "\n".join(lines)
