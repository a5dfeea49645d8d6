"""The words of a command, before anything heavy is imported to read them."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from bdclean.commands.own_modules import allow
from bdclean.commands.yaml_text import MOST_BYTES, NoYAMLError, parse
from bdclean.errors import ConfigError
from bdclean.printable import printable
from bdclean.shipped import with_paths

_CONFIG = ("-c", "--config")
_FLOW = ("{", "[", "&")  # how YAML of more than one value begins


def spelled(words: Sequence[str]) -> list[str]:
    """The words with `--dry-run` written as `--dry_run`; values stay as they are."""
    return [_underscored(word) if word.startswith("--") else word for word in words]


def expanded(words: Sequence[str]) -> list[str]:
    """The words spelled in one way, with the files of `-c NAME`, in an order that can be read.

    Modules of the user that they name can be imported from here on.

    Raises:
        ConfigError: If a config is not there, holds no keys and values, or is not plain; see
            `yaml_text`.
    """
    found = with_paths(spelled(words))
    for option, value in _values(found):
        if option in _CONFIG:
            _config(option, value)
        elif value.lstrip().startswith(_FLOW):
            with suppress(NoYAMLError):  # a name may begin like that as well
                parse(value, option)
        elif value.endswith((".yaml", ".yml")) and _is_file(value):  # a part of a config
            source = f"{option} {printable(value)}"
            parse(_read(Path(value), source), source)
    allow([found, [read_yaml(file) for file in config_files(found)]])
    for key in ("data", "model"):
        found = _class_first(found, key)
    return _without_former_methods(found)


def of_run(words: Sequence[str]) -> list[str]:
    """The words of an evaluation: `--run RUN` without a config takes config and checkpoint of RUN.

    Other weights (`--model.weights`) stand in for the checkpoint.
    """
    found = spelled(words)
    given = {word.partition("=")[0] for word in found}
    run = next((value for name, value in _values(found) if name == "--run"), "")
    config = Path(run) / "config.yaml"
    if given & {"-c", "--config"} or not run or not _is_file(str(config)):
        return list(words)
    weights = [] if given & {"--ckpt_path", "--model.weights"} else ["--ckpt_path", "last"]
    return ["-c", str(config), *words, *weights]


def config_files(words: Sequence[str]) -> list[Path]:
    """The files given with `-c FILE` or `--config=FILE`, in their order; YAML text is none."""
    return [
        Path(value) for option, value in _values(words) if option in _CONFIG and _is_file(value)
    ]


def read_configs(words: Sequence[str]) -> list[dict[str, Any]]:
    """What each `-c` of expanded words gives, whether a file or YAML text, in their order.

    Raises:
        ConfigError: If one is no config.
    """
    return [_config(option, value) for option, value in _values(words) if option in _CONFIG]


def read_yaml(file: Path, option: str = "-c") -> dict[str, Any]:
    """The mapping in a config file.

    Args:
        file: The file.
        option: It was given with this one.

    Raises:
        ConfigError: If it holds none, or more than plain values.
    """
    source = f"{option} {printable(file)}"
    return _require_keys(parse(_read(file, source), source), source)


def _config(option: str, value: str) -> dict[str, Any]:
    if _is_file(value):
        return read_yaml(Path(value), option)
    with suppress(OSError):  # no file has a name that long
        if Path(value).is_fifo():  # as `<(command)` gives; jsonargparse reads it, and once is all
            return {}
    return _require_keys(parse(value, option), option)


def _values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, which is the next word where none is joined with `=`."""
    for word, after in zip_longest(words, words[1:]):
        option, equals, value = word.partition("=")
        if option.startswith("-") and (equals or after is not None):
            yield option, value if equals else after


def _read(file: Path, source: str) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(content) > MOST_BYTES:  # which may end within a character
            return content.decode("utf-8", "replace")
        raise ConfigError(f"{source}: it is no text in UTF-8, and so no config.") from error
    except OSError as error:
        raise ConfigError(f"{source}: it cannot be read ({error.strerror}).") from error


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


_NETWORK = frozenset({"arch", "width", "stem"})
_OF_METHOD = frozenset({"model", "run", "checkpoint", "ckpt_path"})
"""Keys of a config that belong to a method and its run."""
_TRAINING = frozenset(
    {
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches"),
        *("overfit_batches", "accumulate_grad_batches", "gradient_clip_val"),
        *("gradient_clip_algorithm", "val_check_interval", "check_val_every_n_epoch", "callbacks"),
        "reload_dataloaders_every_n_epochs",
    }
)
"""Keys of the trainer that belong to a method, and not to a machine."""


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
    files = config_files(chunk)
    if files:
        settings = read_yaml(files[0]).get("model")
        named = settings.get("class_path") if isinstance(settings, dict) else settings
    else:
        named = (given or chunk[-1]) if name in ("--model", "--model.class_path") else None
    return named.rpartition(".")[2] if isinstance(named, str) else None


def _without_method(chunk: Sequence[str]) -> Sequence[str]:
    """The chunk without the settings of its method, but for those of the network."""
    files = config_files(chunk)
    if not files:  # `--model CLASS`
        return chunk
    config = read_yaml(files[0])
    kept = {key: value for key, value in config.items() if key not in _OF_METHOD}
    model, trainer = config["model"], config.get("trainer")
    if isinstance(model, dict):
        given = model.get("init_args")
        network = {k: given[k] for k in given if k in _NETWORK} if isinstance(given, dict) else {}
        kept["model"] = {"class_path": model["class_path"], "init_args": network}
    if isinstance(trainer, dict):
        kept["trainer"] = {key: v for key, v in trainer.items() if key not in _TRAINING}
    return ["-c", yaml.safe_dump(kept, sort_keys=False)] if kept else []


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
