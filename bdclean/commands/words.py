"""The words of a command, before anything heavy is imported to read them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from bdclean.commands.own_modules import allow
from bdclean.errors import ConfigError
from bdclean.printable import printable
from bdclean.runs import HARDWARE, leaves
from bdclean.shipped import with_paths
from bdclean.yaml_text import NoYAMLError, parse, read

_CONFIG = ("-c", "--config")
_FLOW = ("{", "[", "&")  # how YAML of more than one value begins
_LONGEST = 255  # bytes in the name of a file or folder
_LONGEST_PATH = 4096 - 2 * _LONGEST  # bytes, which leave room for the files of a run
_ENDS = (".yaml", ".yml")
_OPTION = re.compile(r"--[\w.-]+\+?(=.*)?", re.DOTALL)
_NUMBER = re.compile(r"-(\.?\d[\w.+-]*|\.?inf|\.?nan)", re.IGNORECASE)
"""A number below zero, which argparse takes for an option unless its form is the simplest."""


def spelled(words: Sequence[str]) -> list[str]:
    """The words with `--dry-run` written as `--dry_run`; values stay as they are."""
    return [_underscored(word) if _OPTION.fullmatch(word) else word for word in words]


def with_pipes_read(words: Sequence[str]) -> list[str]:
    """The words, in which the text of a pipe stands for it: `-c <(command)` can be read but once.

    Raises:
        ConfigError: If a pipe cannot be read, or holds no text.
    """
    chunks = _chunks(words, _CONFIG)
    for chunk in chunks:
        for option, value in values_in(chunk):
            if option in _CONFIG and _is_pipe(value):
                chunk[:] = [option, read(Path(value), f"{option} {printable(value)}")]
    return [word for chunk in chunks for word in chunk]


def expanded(words: Sequence[str]) -> list[str]:
    """The words spelled in one way, with the files of `-c NAME`, in an order that can be read.

    Modules of the user that they name can be imported from here on.

    Raises:
        ConfigError: If a config is not there, holds no keys and values, or is not plain (see
            `yaml_text`); if a setting would let a run write elsewhere than into its folder.
    """
    found = _joined(with_paths(with_pipes_read(spelled(words))))
    for option, value in values_in(found):
        key = "" if option in _CONFIG else option.lstrip("-")
        file = Path(value) if _is_file(value) else Path("words")
        settings = _settings(content_of(option, value), key, (file.absolute(),))
        whole = [] if key == "checkpoint" else [(key, value)]  # text may begin like YAML
        for name, setting in (*whole, *settings):
            _check_place(name, setting)
    allow([found, read_configs(found)])
    for key in ("data", "model"):
        found = _class_first(found, key)
    return _absolute(_without_former_methods(_run_last(found)))


def of_run(words: Sequence[str]) -> list[str]:
    """The words of an evaluation: `--run RUN` without a config takes config and checkpoint of RUN.

    Other weights (`--model.weights`) stand in for the checkpoint.
    """
    found = spelled(words)
    given = {word.partition("=")[0] for word in found}
    run = next((value for name, value in values_in(found) if name == "--run"), "")
    config = Path(run) / "config.yaml"
    if given & {"-c", "--config"} or not run or not _is_file(str(config)):
        return list(words)
    weights = [] if given & {"--ckpt_path", "--model.weights"} else ["--ckpt_path", "last"]
    return ["-c", str(config), *words, *weights]


def as_typed(words: Sequence[str]) -> list[str]:
    """The words of an evaluation without those that `of_run` adds."""
    found = list(words)
    run = next((value for name, value in values_in(found) if name == "--run"), "")
    if run and found[:2] == ["-c", str(Path(run) / "config.yaml")]:
        found = found[2:]
        if found[-2:] == ["--ckpt_path", "last"]:
            found = found[:-2]
    return found


def read_configs(words: Sequence[str]) -> list[dict[str, Any]]:
    """What each `-c` of expanded words gives, whether a file or YAML text, in their order.

    Raises:
        ConfigError: If one is no config.
    """
    return [_config(option, value) for option, value in values_in(words) if option in _CONFIG]


def read_yaml(file: Path, option: str = "-c") -> dict[str, Any]:
    """The mapping in a config file.

    Args:
        file: The file.
        option: It was given with this one.

    Raises:
        ConfigError: If it holds none, or more than plain values.
    """
    source = f"{option} {printable(file)}"
    return _require_keys(parse(read(file, source), source), source)


def _config(option: str, value: str) -> dict[str, Any]:
    if _is_file(value):
        return read_yaml(Path(value), option)
    return _require_keys(parse(value, option), option)


def content_of(option: str, value: str) -> Any:
    """What an option gives: a config, a part of one in a file or as text, or a plain value."""
    if option in _CONFIG:
        return _config(option, value)
    if value.lstrip().startswith(_FLOW):
        with suppress(NoYAMLError):  # a name may begin like that as well
            return parse(value, option)
    elif value.endswith(_ENDS) and _is_file(value):
        source = f"{option} {printable(value)}"
        return parse(read(Path(value), source), source)
    return value


def _settings(content: Any, key: str, files: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    """The settings of a config, and those of the files that it names in place of some of them.

    Args:
        content: Of the config.
        key: At which it stands.
        files: From the first one to the one that holds it.

    Raises:
        ConfigError: If a file names itself, or is not plain.
    """
    for name, value in leaves(content, key):
        yield name, value
        file = files[-1].parent / value if str(value).endswith(_ENDS) else None
        if file is None or not _is_file(str(file)):
            continue
        source = f"-c {printable(files[-1].name)}: {printable(name)}={printable(value)}"
        if file.resolve() in [each.resolve() for each in files]:
            raise ConfigError(f"{source}: a config cannot hold itself.")
        inner = "" if name in ("config", "") else name
        yield from _settings(parse(read(file, source), source), inner, (*files, file))


def _check_place(key: str, value: Any) -> None:
    """Refuses settings of Lightning that say where to write, which `--run` alone does."""
    if key == "checkpoint":  # of it too `--run` says where it writes, whatever else it is
        raise ConfigError(
            f"--{key}={'null' if value is None else value}: set its options one by one, as "
            f"--{key}.NAME VALUE."
        )
    if value is None or value == "null":
        return
    if key == "run":
        _check_name(str(value))
    if key in ("checkpoint.dirpath", "trainer.default_root_dir"):
        raise ConfigError(f"--{key}={value}: a run writes into one folder; name it with --run.")
    if key == "checkpoint.filename" and not _is_name(str(value)):
        raise ConfigError(
            f"--{key}={str(value)[:20]}: it must be a short name, in which braces hold metrics."
        )
    plain = re.sub(r"\{.*?\}", "", str(value))  # `{val/acc:.2f}` is the value of a metric
    if key == "checkpoint.filename" and ("/" in plain or ".." in str(value)):
        raise ConfigError(
            f"--{key}={value}: give the name of a file alone, without a folder; --run names that."
        )


def _is_name(file: str) -> bool:
    """Whether Lightning can make a name of a checkpoint of it, and a file system have that."""
    try:
        braces = [field for _, field, _, _ in Formatter().parse(file) if field is not None]
    except ValueError:
        return False
    return all(braces) and len(os.fsencode(file)) < _LONGEST - 50  # metrics, and what is unfinished


def _check_name(run: str) -> None:
    """Refuses a run folder that no file system has, or whose name nobody can type or read."""
    shown = f"{printable(run)[:20]}..."
    if printable(run) != run:
        raise ConfigError(
            f"--run={printable(run)[:_LONGEST]}: it holds a character that cannot be shown; name "
            "another folder."
        )
    if any(len(os.fsencode(part)) > _LONGEST for part in Path(run).parts):
        raise ConfigError(
            f"--run={shown}: a name in it has more than {_LONGEST} bytes; shorten it."
        )
    whole = os.fsencode(os.path.abspath(run))  # noqa: PTH100  (Path.resolve follows links)
    if len(whole) > _LONGEST_PATH:
        raise ConfigError(
            f"--run={shown}: the whole path has more than {_LONGEST_PATH} bytes; shorten it."
        )


def _joined(words: Sequence[str]) -> list[str]:
    """The words, in which a value that begins with a dash is joined with its option by `=`."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        number = before.startswith("--") and "=" not in before and _NUMBER.fullmatch(word)
        if number or (before in _CONFIG and word.startswith("---")):  # how YAML may begin
            found[-1] = f"{'--config' if before in _CONFIG else before}={word}"
        else:
            found.append(word)
    return found


def _absolute(words: Sequence[str]) -> list[str]:
    """The words with whole paths of configs: jsonargparse changes the folder while it reads one."""
    chunks = _chunks(words, _CONFIG)
    for chunk in chunks:
        for option, value in values_in(chunk):
            if option in _CONFIG and _is_file(value):
                path = str(Path(value).absolute())
                chunk[-1] = path if chunk[1:] else f"{option}={path}"
    return [word for chunk in chunks for word in chunk]


def values_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, which is the next word where none is joined with `=`."""
    for word, after in pairwise([*words, "-"]):
        option, equals, value = word.partition("=")
        if option.startswith("-") and (equals or not _is_option(after)):
            yield option, value if equals else after


def _require_keys(content: Any, source: str) -> dict[str, Any]:
    if not content or not isinstance(content, dict):
        raise ConfigError(f"{source}: it must hold keys and values, as `run: runs/mine`.")
    for key in content:
        if not isinstance(key, str):
            shown = "null" if key is None else key
            raise ConfigError(
                f"{source}: the key {shown} is no name of an option; the first keys of a config "
                "are those as `run`, `data`, `model` and `trainer`."
            )
    return content


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


def _run_last(words: list[str]) -> list[str]:
    """The words, in which `--run` comes after the configs, whose `run` would count otherwise."""
    chunks = _chunks(words, (*_CONFIG, "--run"))
    place = max((n for n, chunk in enumerate(chunks, 1) if read_configs(chunk)), default=0)
    early = [chunk for chunk in chunks[:place] if chunk[0].partition("=")[0] == "--run"]
    others = [chunk for chunk in chunks[:place] if chunk not in early]
    return [word for chunk in (*others, *early, *chunks[place:]) for word in chunk]


_KEPT = frozenset({"data", "seed_everything"})
"""What a config brings to a method that it was not written for; parts of two sections join it."""
_OF_NETWORK = frozenset({"arch", "width", "stem"})
_OF_MACHINE = HARDWARE | {
    *("precision", "num_sanity_val_steps", "deterministic", "benchmark", "sync_batchnorm"),
}


def _without_former_methods(words: list[str]) -> list[str]:
    """The words, in which a config of another method than the last one brings no settings of it.

    So `-c runs/victim/config.yaml -c purify/bcu` has the victim's data, network, seed and hardware.
    Settings of its training do not count for BCU, although some have a name in common.
    """
    chunks = _chunks(words, ("-c", "--config", "--model", "--model.class_path"))
    methods = [_method(chunk) for chunk in chunks]
    last = next((method for method in reversed(methods) if method), None)
    return [
        word
        for chunk, method in zip(chunks, methods, strict=True)
        for word in (chunk if method in (None, last) else _without_method(chunk))
    ]


def _method(chunk: Sequence[str]) -> str | None:
    """The short name of the method that a config or an option names."""
    name, _, given = chunk[0].partition("=")
    named = (given or chunk[-1]) if name in ("--model", "--model.class_path") else None
    for config in read_configs(chunk):
        model = config.get("model")
        named = model.get("class_path") if isinstance(model, Mapping) else model
    return named.rpartition(".")[2] if isinstance(named, str) else None


def _without_method(chunk: Sequence[str]) -> Sequence[str]:
    """The chunk without the settings of its method, but for those of the network."""
    configs = read_configs(chunk)
    if not configs:  # `--model CLASS`
        return chunk
    config = configs[0]
    kept = {key: value for key, value in config.items() if key in _KEPT}
    if trainer := _part(config.get("trainer"), _OF_MACHINE):
        kept["trainer"] = trainer
    model = config["model"]
    if isinstance(model, Mapping):
        network = _part(model.get("init_args"), _OF_NETWORK) or {}
        kept["model"] = {"class_path": model["class_path"], "init_args": network}
    return ["-c", yaml.safe_dump(kept, sort_keys=False)] if kept else []


def _part(settings: Any, keys: frozenset[str]) -> Any:
    """The settings of these names; what is no mapping stays, so that the parser can refuse it."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: value for key, value in settings.items() if key in keys}


def _chunks(words: Sequence[str], options: Sequence[str]) -> list[list[str]]:
    """The words, those of `options` together with the value that follows."""
    chunks: list[list[str]] = []
    for word in words:
        if chunks and chunks[-1][-1] in options and not _is_option(word):
            chunks[-1].append(word)
        else:
            chunks.append([word])
    return chunks


def _sets(chunk: Sequence[str], key: str) -> str:
    """What an option or a config says of `data` or `model`: `class`, `arguments` or nothing."""
    configs = read_configs(chunk)
    if not configs:
        names = (f"--{key}", f"--{key}.class_path")
        return "class" if chunk[0].partition("=")[0] in names else ""
    settings = configs[0].get(key)
    if isinstance(settings, Mapping) and "class_path" not in settings:
        return "arguments"
    return "" if settings is None else "class"


def _is_option(word: str) -> bool:
    return word in ("-", "-c", "-h") or _OPTION.fullmatch(word) is not None


def _is_file(value: str) -> bool:
    with suppress(OSError, ValueError):  # no file has a name that long, or with a null byte
        return Path(value).is_file()
    return False


def _is_pipe(value: str) -> bool:
    with suppress(OSError, ValueError):
        return Path(value).is_fifo()
    return False


def _underscored(word: str) -> str:
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
