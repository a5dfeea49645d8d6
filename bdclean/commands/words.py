"""The words of a command, before anything heavy is imported to read them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bdclean.errors import ConfigError
from bdclean.shipped import with_paths


def spelled(words: Sequence[str]) -> list[str]:
    """The words with `--dry-run` written as `--dry_run`; values stay as they are."""
    return [_underscored(word) if word.startswith("--") else word for word in words]


def expanded(words: Sequence[str]) -> list[str]:
    """The words spelled in one way, with the files of `-c NAME`.

    Raises:
        ConfigError: If a config is not there, or holds no keys and values.
    """
    found = with_paths(spelled(words))
    for file in config_files(found):
        read_yaml(file)
    return found


def config_files(words: Sequence[str]) -> list[Path]:
    """The files given with `-c FILE` or `--config=FILE`, in their order; YAML text is none."""
    given = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            given.append(value if equals else after)
    return [Path(value) for value in given if "\n" not in value and _is_file(value)]


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a config file.

    Raises:
        ConfigError: If it holds none.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"-c {file}: it is no YAML ({place}{error.problem}).") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"-c {file}: it cannot be read ({error}).") from error
    if not content or not isinstance(content, dict):
        raise ConfigError(f"-c {file}: it must hold keys and values, as `run: runs/mine`.")
    return content


def _is_file(value: str) -> bool:
    with suppress(OSError):  # no file has a name that long
        return Path(value).is_file()
    return False


def _underscored(word: str) -> str:
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
