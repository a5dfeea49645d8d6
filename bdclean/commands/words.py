"""The words of a command, before anything heavy is imported to read them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bdclean.commands.own_modules import allow
from bdclean.errors import ConfigError
from bdclean.shipped import with_paths


def spelled(words: Sequence[str]) -> list[str]:
    """The words with `--dry-run` written as `--dry_run`; values stay as they are."""
    return [_underscored(word) if word.startswith("--") else word for word in words]


def expanded(words: Sequence[str]) -> list[str]:
    """The words spelled in one way, with the files of `-c NAME`, in an order that can be read.

    Modules of the user that they name can be imported from here on.

    Raises:
        ConfigError: If a config is not there, or holds no keys and values.
    """
    found = with_paths(spelled(words))
    allow([found, [read_yaml(file) for file in config_files(found)]])
    for key in ("data", "model"):
        found = _class_first(found, key)
    return found


def of_run(words: Sequence[str]) -> list[str]:
    """The words of an evaluation: `--run RUN` without a config takes config and checkpoint of RUN.

    Other weights (`--model.weights`) stand in for the checkpoint.
    """
    found = spelled(words)
    given = {word.partition("=")[0] for word in found}
    run = next((value for name, value in _pairs(found) if name == "--run"), "")
    config = Path(run) / "config.yaml"
    if given & {"-c", "--config"} or not run or not _is_file(str(config)):
        return list(words)
    weights = [] if given & {"--ckpt_path", "--model.weights"} else ["--ckpt_path", "last"]
    return ["-c", str(config), *words, *weights]


def config_files(words: Sequence[str]) -> list[Path]:
    """The files given with `-c FILE` or `--config=FILE`, in their order; YAML text is none."""
    given = [value for name, value in _pairs(words) if name in ("-c", "--config")]
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


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Each word as an option, with the value that belongs to it if it is one."""
    pairs = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        pairs.append((option, value if equals else after))
    return pairs


def _class_first(words: list[str], key: str) -> list[str]:
    """The words, in which configs that only set arguments come after the one of the class.

    So `-c attack/sig/cbd -c data/digits` is read as the other way round.
    """
    chunks = _chunks(words, ("-c", "--config", f"--{key}", f"--{key}.class_path"))
    sets = [_sets(chunk, key) for chunk in chunks]
    place = sets.index("class") if "class" in sets else 0
    if "arguments" not in sets[:place]:
        return words
    early = [chunk for chunk, what in zip(chunks[:place], sets, strict=False) if what]
    others = [chunk for chunk, what in zip(chunks[:place], sets, strict=False) if not what]
    ordered = [*others, chunks[place], *early, *chunks[place + 1 :]]
    return [word for chunk in ordered for word in chunk]


def _chunks(words: Sequence[str], options: Sequence[str]) -> list[list[str]]:
    """The words, those of `options` together with the value that follows."""
    chunks, rest = [], iter(words)
    for word in rest:
        values = [next(rest, None)] if word in options else []
        chunks.append([word, *(value for value in values if value is not None)])
    return chunks


def _sets(chunk: Sequence[str], key: str) -> str:
    """What an option or a config says of `data` or `model`: `class`, `arguments` or nothing."""
    files = config_files(chunk)
    if not files:
        names = (f"--{key}", f"--{key}.class_path")
        return "class" if chunk[0].partition("=")[0] in names else ""
    settings = read_yaml(files[0]).get(key)
    if isinstance(settings, dict) and "class_path" not in settings:
        return "arguments"
    return "" if settings is None else "class"


def _is_file(value: str) -> bool:
    with suppress(OSError):  # no file has a name that long
        return Path(value).is_file()
    return False


def _underscored(word: str) -> str:
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
