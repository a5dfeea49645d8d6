"""What a user may have meant: the option or the class that a wrong word is nearest to."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from bdclean.commands.rooms import (
    BASES,
    base_of,
    classes_of,
    find_class,
    others_of,
    why_not_imported,
)
from bdclean.errors import ConfigError
from bdclean.files import SAFETENSORS
from bdclean.runs import RunFolder
from bdclean.shipped import names

_NEAR = 0.75
"""Similarity of two words, from 0 to 1, above which one may be meant by the other."""

_GENERAL = (
    *("run", "ckpt_path", "seed_everything", "test_after_fit", "model", "data", "data.attack"),
    *("trainer.max_epochs", "trainer.devices", "trainer.fast_dev_run", "trainer.accelerator"),
    *("trainer.precision", "trainer.strategy", "trainer.max_time"),
)
"""Options of every fit; what else there is depends on the classes."""

_OTHER_NAMES = {
    "ckpt": ("ckpt_path",),
    "checkpoint": ("ckpt_path",),
    "resume": ("ckpt_path",),
    "resume_from_checkpoint": ("ckpt_path",),
    "out": ("run",),
    "output": ("run",),
    "output_dir": ("run",),
    "save_dir": ("run",),
    "default_root_dir": ("run",),
    "seed": ("seed_everything",),
    "gpu": ("trainer.accelerator",),
    "gpus": ("trainer.devices",),
    "num_gpus": ("trainer.devices",),
    "dryrun": ("dry_run", "trainer.fast_dev_run"),
    "dry_run": ("trainer.fast_dev_run",),
    "debug": ("trainer.fast_dev_run",),
    "epoch": ("recipe.epochs", "trainer.max_epochs"),
    "epochs": ("recipe.epochs", "trainer.max_epochs"),
    "num_epochs": ("recipe.epochs", "trainer.max_epochs"),
    "max_epochs": ("trainer.max_epochs", "recipe.epochs"),
    "lr": ("recipe.lr", "optimizer.lr"),
    "learning_rate": ("recipe.lr", "optimizer.lr"),
    "weight_decay": ("recipe.weight_decay", "optimizer.weight_decay"),
    "momentum": ("recipe.momentum", "optimizer.momentum"),
    "batch": ("recipe.batch_size", "model.batch_size"),
    "batch_size": ("recipe.batch_size", "model.batch_size"),
    "bs": ("recipe.batch_size", "model.batch_size"),
    "dataset": ("data",),
    "attack": ("data.attack",),
    "poison_rate": ("attack.rate",),
    "arch": ("model.arch",),
    "backbone": ("model.arch",),
    "amp": ("trainer.precision",),
}
"""What other programs call an option: the ends of its dotted name here, the best one first."""

OTHER_COMMANDS = {"list": "ls", "show": "cat", "print": "cat", "copy": "cp", "view": "preview"}
"""What other programs call a command of a command."""

_HOW = (
    ("data.attack.", "`bdclean fit --data.attack.help CLASS`"),
    ("data.", "`bdclean fit --data.help CLASS`"),
    ("model.", "`bdclean fit --model.help CLASS`"),
    ("trainer.", "`bdclean fit --help_all`"),
)


def meant(name: str, known: Iterable[str]) -> str:
    """The sentence that follows a wrong option: what was meant, or how to list the options.

    Args:
        name: Dotted, as it was typed, without dashes.
        known: Dotted names of the options that there are.
    """
    options = [each for each in dict.fromkeys(known) if "facts" not in each.split(".")]
    options = [each for each in options if each != name]  # which a config cannot give, as `help`
    found = _same_end(name, options) or _swapped(name, options)
    found = found or _near_end(name, options) or _near(name, options)
    found = found or _deeper(name, options) or _one_off(name, options)
    if found:
        return f" Did you mean --{found}?"
    how = next((how for begin, how in _HOW if name.startswith(begin)), "The command's --help")
    return f" {how} lists the options."


def meant_as(word: str, options: Iterable[str]) -> str:
    """The sentence on the option that a word lacks: `-c`, `--run`; empty where nobody knows.

    Args:
        word: As it was typed, with no option before it.
        options: Dotted names of those that there are.
    """
    if "run" not in options:
        return ""
    if re.fullmatch(r"-\w[\w.]+", word):
        return f" Did you mean -{word}?"
    if word.endswith((".yaml", ".yml")) or names(word):
        return f" Did you mean -c {word}?"
    if word.endswith(".ckpt"):
        return f" Did you mean --ckpt_path {word}?"
    if word.endswith((SAFETENSORS, ".pt", ".pth")):
        return f" Did you mean --model.weights {word}?"
    return f" Did you mean --run {word}?" if RunFolder(Path(word)).is_run else ""


def _same_end(name: str, options: Sequence[str]) -> str | None:
    last = _last(name)
    ends = (last, *_OTHER_NAMES.get(last, ()))
    if "." not in name:
        ends = (*ends[1:], last)  # `--seed` is the one of the run
    of_fit = name.startswith("model.") or any(each.startswith("trainer.") for each in options)
    for end in ends:
        found = [each for each in options if f".{each}".endswith(f".{end}")]
        found += [end] if of_fit and end in _GENERAL else []
        if found:
            return min(found, key=lambda each: (_elsewhere(name, each), each.count(".")))
    return None


def _swapped(name: str, options: Sequence[str]) -> str | None:
    """The option of the same letters in another order: `run` for `rnu`."""
    return next((each for each in options if sorted(each) == sorted(name)), None)


def _near_end(name: str, options: Sequence[str]) -> str | None:
    """The option whose last part is like that of `name`, which may stand in another group."""
    parts = {_last(each) for each in options}
    near = get_close_matches(_last(name), sorted(parts), n=1, cutoff=_NEAR)
    found = [each for each in options if near and _last(each) == near[0]]
    return max(found, key=lambda each: _like(name, each), default=None)


def _near(name: str, options: Sequence[str]) -> str | None:
    near = get_close_matches(name, options, n=1, cutoff=0.85)
    return near[0] if near else None


def _deeper(name: str, options: Sequence[str]) -> str | None:
    """The one group of options of that name, which stands in another: `data.splits`."""
    ends = (f".{each}.".find(f".{name}.") for each in options)
    groups = {each[: end + len(name)] for each, end in zip(options, ends, strict=True) if end > 0}
    return groups.pop() if len(groups) == 1 else None


def _one_off(name: str, options: Sequence[str]) -> str | None:
    """The option that differs in one letter, which in a short word is much: `out` for `oot`."""
    return next((each for each in options if len(name) > 2 and _differ_in_one(name, each)), None)


def _differ_in_one(one: str, other: str) -> bool:
    begin = _same(one, other)
    end = _same(one[begin:][::-1], other[begin:][::-1])
    return max(len(one), len(other)) - begin - end == 1


def _same(one: str, other: str) -> int:
    """The letters at the beginning that two words have in common."""
    alike = (a == b for a, b in zip(one, other, strict=False))
    return next((n for n, same in enumerate(alike) if not same), min(len(one), len(other)))


def near_class(name: str | None, key: str) -> str | None:
    """The class of torch or Lightning that may be meant at a key such as `model.optimizer`.

    Args:
        name: As it was typed: a short name, or an import path.
        key: Dotted, of the option.
    """
    short, names = str(name).rpartition(".")[2], others_of(key)
    return _near_name(short, names)


def _near_name(name: str, names: Iterable[str]) -> str | None:
    """The name of a class that may be meant: `CIFAR10` by `cifar-10`."""
    plain = {_plain(each): each for each in names}
    near = get_close_matches(_plain(name), plain, n=1, cutoff=_NEAR)
    found = near[0] if near else _swapped(_plain(name), list(plain))
    return None if found is None else plain[found]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def no_class(name: Any, bases: Sequence[type], key: str = "") -> str:
    """The sentence about a class that is not there, or that nothing can be made of.

    Args:
        name: As it was typed: a short name, or an import path.
        bases: What the class must be made from.
        key: Dotted, of the option, to look among the classes of others as well.
    """
    if failed := why_not_imported(str(name)):
        return failed
    names = [each for base in bases for each in classes_of(base)]
    known = f" Known are {', '.join(names)}." if names else ""
    given = find_class(str(name)) or _abstract(str(name).rpartition(".")[2], bases)
    if inspect.isclass(given) and (inspect.isabstract(given) or given in bases):
        below = _below(given, bases)
        lacking = sorted(getattr(given, "__abstractmethods__", ()))
        if lacking and not below:
            are = "s are" if lacking[1:] else " is"
            return f"nothing can be made of it, because its method{are} missing: {_all(lacking)}."
        return _base_class(below)
    if inspect.isclass(given) and bases and not issubclass(given, tuple(bases)):
        return f"it is no {' or '.join(base.__name__ for base in bases)}.{known}"
    meant = _near_name(str(name).rpartition(".")[2], names) or near_class(name, key)
    return f"there is no such class.{f' Did you mean {meant}?' if meant else known}"


def require_concrete(parsed: Any) -> None:
    """Refuses base classes that are not abstract to Python: Lightning's, and some of ours.

    Args:
        parsed: The words of a command, as jsonargparse gives them.

    Raises:
        ConfigError: If `--model` or `--data` names one.
    """
    for key, value in parsed.items():
        name = key.removesuffix(".class_path").rpartition(".")[2]
        if name not in BASES or not key.endswith(".class_path"):
            continue
        kind = find_class(str(value))
        if inspect.isclass(kind) and kind.__module__.startswith(("bdclean.", "lightning.")):
            below = _below(kind, [base_of(name)])
            if below and kind.__name__ not in below:
                raise ConfigError(f"--{name}={value}: {_base_class(below)}")


def _base_class(below: Sequence[str]) -> str:
    choices = f"; choose {_either(below)}, or a class of your own" if below else ""
    return f"it is a base class, so that nothing can be made of it{choices}."


def _below(kind: type, bases: Sequence[type]) -> list[str]:
    return [name for name, each in _offered(bases).items() if issubclass(each, kind)]


def _offered(bases: Sequence[type]) -> Mapping[str, type]:
    return {name: kind for base in bases for name, kind in classes_of(base).items()}


def _abstract(name: str, bases: Sequence[type]) -> type | None:
    """The abstract class of a short name, among those that the offered ones are made from."""
    above = [kind for each in _offered(bases).values() for kind in each.__mro__]
    return next((kind for kind in above if kind.__name__ == name), None)


def _elsewhere(name: str, option: str) -> bool:
    return option.split(".")[0] != name.split(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("-", "_")


def _like(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _all(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
