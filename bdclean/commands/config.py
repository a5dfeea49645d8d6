"""`bdclean config ls | cat | cp`: the config files that come with the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdclean import shipped
from bdclean.commands.parsing import Parser
from bdclean.errors import ConfigError

_NAME = "A name that `bdclean config ls` lists."
_MORE = "configs/README.md"


def run_config(words: Sequence[str]) -> None:
    """The command.

    Args:
        words: Those after `bdclean config`.

    Raises:
        ConfigError: If there is no config of that name, or the copy cannot be written.
    """
    config = make_parser().parse_args(list(words))
    chosen = config[config.subcommand]
    if config.subcommand == "ls":
        print(listing(chosen.kind))
    elif config.subcommand == "cat":
        print(shipped.find(chosen.name, "NAME").read_text("utf-8"), end="")
    else:
        print(f"Written to {copy(chosen.name, Path(chosen.dest))}.")


def make_parser() -> Parser:
    """The parser of the three commands."""
    parser = Parser(
        prog="bdclean config",
        usage="bdclean config {ls,cat,cp} ...",
        description="The configs that `-c NAME` finds in every command.",
        example="bdclean config ls attack",
        more=_MORE,
    )
    commands = parser.add_subcommands()
    ls = _add(commands, "ls [KIND]", "Lists the names, and what each config is.", "attack")
    ls.add_argument(
        "kind", metavar="KIND", nargs="?", type=str, default="", help="Only these: attack, cbd ..."
    )
    cat = _add(commands, "cat NAME", "Prints a config.", "purify/cbd")
    cp = _add(commands, "cp NAME DEST", "Copies a config, to change it.", "purify/cbd mine.yaml")
    for each in (cat, cp):
        each.add_argument("name", metavar="NAME", type=str, help=_NAME)
    cp.add_argument(
        "dest", metavar="DEST", type=str, help="A new file, or the folder to put it into."
    )
    return parser


def _add(commands: Any, usage: str, does: str, example: str) -> Parser:
    """Adds a command, which begins with its name; `example` are the words after it."""
    name = usage.split(" ")[0]
    command = Parser(
        usage=f"bdclean config {usage}",
        description=does,
        example=f"bdclean config {name} {example}",
        more=_MORE,
    )
    commands.add_subcommand(name, command, help=does)
    return command


def listing(kind: str = "") -> str:
    """A line per config: its name, and the first line of its file.

    Args:
        kind: Only the configs in this folder, or else those with this in their names; "" lists
            all.

    Raises:
        ConfigError: If there is none.
    """
    found = shipped.names(kind.rstrip("/"))
    found = found or [name for name in shipped.names() if kind.lower() in name]
    if not found:
        kinds = sorted({name.split("/")[0] for name in shipped.names()})
        raise ConfigError(f"KIND {kind}: there are no such configs. Kinds are {', '.join(kinds)}.")
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {_about(name)}" for name in found)


def copy(name: str, dest: Path) -> Path:
    """Copies a config and returns the new file.

    Args:
        name: Of the config.
        dest: The new file, or a folder to put it into.

    Raises:
        ConfigError: If there is no such config, or the file exists or cannot be written.
    """
    source = shipped.find(name, "NAME")
    target = dest
    try:
        target = dest / source.name if dest.is_dir() else dest
        target.open("xb").close()
        try:
            target.write_bytes(source.read_bytes())
        except OSError:
            target.unlink()
            raise
    except FileExistsError as error:
        raise ConfigError(f"DEST {target}: the file exists; name a new one.") from error
    except OSError as error:
        missing = not target.parent.is_dir()
        first = f" Make the folder {target.parent} first." if missing else ""
        raise ConfigError(
            f"DEST {target}: it cannot be written ({error.strerror}).{first}"
        ) from error
    return target


def _about(name: str) -> str:
    first, _, _ = shipped.find(name, "NAME").read_text("utf-8").partition("\n")
    return first.removeprefix("# ")
