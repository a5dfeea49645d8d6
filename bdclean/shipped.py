"""What comes with the package: config files, found by name (`purify/cbd`), and the pages."""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from bdclean.errors import ConfigError

_OPTIONS = ("-c", "--config")
_OTHER_FILES = {
    **dict.fromkeys((".safetensors", ".pt", ".pth", ".bin"), "--model.weights"),
    ".ckpt": "--ckpt_path, or as weights with --model.weights",
}
"""Options for files that are no configs, by the ends of their names."""
_NAME_OR_PATH = re.compile(r"(?!-)[\w./-]+")  # YAML on the command line has other characters too


def folder() -> Path:
    """Where the files lie: inside an installed package, next to the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def page(name: str) -> str:
    """Where a page of the documentation lies, seen from the present folder.

    Args:
        name: As in the repository: `docs/how_to/check.md`.
    """
    package = Path(__file__).parent
    file = package / name if (package / name).is_file() else package.parent / name
    with suppress(OSError, ValueError):  # it lies elsewhere, or the present folder is gone
        return str(file.relative_to(Path.cwd()))
    return str(file)


def names(under: str = "") -> list[str]:
    """The names of all files, sorted.

    Args:
        under: Only this name and those below it, as in `attack` or `purify/cbd`.
    """
    found = _names(folder())
    return [name for name in found if not under or f"{name}/".startswith(f"{under}/")]


@cache
def _names(top: Path) -> list[str]:
    """Those of all files; a command asks a dozen times."""
    return sorted(path.relative_to(top).as_posix()[:-5] for path in top.rglob("*.yaml"))


def find(name: str, key: str) -> Path:
    """The file of a name.

    Args:
        name: For example `purify/cbd`.
        key: What the user gave the name as, for the message.

    Raises:
        ConfigError: If there is no such file. The message lists the files of a folder, otherwise
            the names that are most like it.
    """
    name = name.rstrip("/")
    found = names(name)
    if name in found:
        return folder() / f"{name}.yaml"
    if found:
        depth = name.count("/") + 2
        choices = sorted({"/".join(each.split("/")[:depth]) for each in found})
        raise ConfigError(f"{key} {name}: it is a folder of configs. Choose {_either(choices)}.")
    near = get_close_matches(
        name.removeprefix("configs/").removesuffix(".yaml"), names(), cutoff=0.5
    )
    meant = f"Did you mean {_either(near)}? " if near else ""
    raise ConfigError(
        f"{key} {name}: there is no such file and no config of that name. {meant}`bdclean config "
        "ls` lists all names."
    )


def path_of(value: str, key: str) -> str:
    """What `value` stands for: a file of the user's own if there is one, else a file of ours.

    Args:
        value: A path or a name. YAML text is returned as it is.
        key: What the user gave it as, for the message.

    Raises:
        ConfigError: If there is neither a file nor a config of that name.
    """
    path = Path(value)
    if instead := _OTHER_FILES.get(path.suffix):
        raise ConfigError(f"{key} {value}: it is no config; give it with {instead}.")
    if re.match(r"\w+://", value):
        raise ConfigError(f"{key} {value}: nothing is downloaded; give a file of this machine.")
    with suppress(OSError, ValueError):  # no file has a name that long, or with a null byte
        if path.is_file() or path.is_fifo():
            if value in names():
                _tell_which(value, key)
            return value
        if path.is_dir() and value and not names(value.rstrip("/")):  # `data` is both
            raise ConfigError(f"{key} {value}: it is a folder; give a config file.")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{key} {value}: it is no file; give a config file.")
    return str(find(value, key)) if _NAME_OR_PATH.fullmatch(value) else value


@cache
def _tell_which(value: str, key: str) -> None:
    """Says once that a file hides a config of that name."""
    print(f"{key} {value}: this is your file, not the config of that name.", file=sys.stderr)


def with_paths(words: Sequence[str]) -> list[str]:
    """The words of a command, in which `-c NAME` and `--config=NAME` have become `-c PATH`.

    A word that begins with a dash is never the value of another option, so these are options.

    Raises:
        ConfigError: If there is neither a file nor a config of some name.
    """
    found = list(words)
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in _OPTIONS and equals:
            found[place] = f"{option}={path_of(value, option)}"
        elif option in _OPTIONS and place + 1 < len(words):
            found[place + 1] = path_of(words[place + 1], option)
    return found


def _either(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if choices[1:] else choices)
