"""`bdclean fit --help`: the options of the chosen method, data set and attack, and the usual ones.

Lightning's own help lists several hundred options of everything; `--help_all` shows it.
"""

from argparse import Action
from collections.abc import Mapping, Sequence
from inspect import getdoc
from textwrap import fill
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch import LightningDataModule, LightningModule

from bdclean.attacks import Attack
from bdclean.commands import TRAINER
from bdclean.commands.rooms import classes_of, find_class
from bdclean.commands.words import config_files, expanded, read_yaml

_KINDS = {"model": LightningModule, "data": LightningDataModule, "data.attack": Attack}
_WIDTH = 100
_HIDDEN = {"facts", "view"}  # set by the data, and by the method
_OWN = {
    "-c FILE, --config FILE": "A config; several stack, and later ones win.",
    "--run FOLDER": "Folder that the run writes into.",
    "--ckpt_path FILE": "A checkpoint to go on with or to measure; `last` is the newest of --run.",
    "--seed_everything N": "Seed of all that is drawn in training; 0 if left out.",
    "--test_after_fit false": "Do not measure ACC, ASR and PA at the end of a fit.",
    "--print_config": "Print the merged config, and do nothing.",
    "--help_all": "All options, those of Lightning's Trainer and checkpoints among them.",
}
_TRAINER_OPTIONS = {
    "--trainer.accelerator NAME": "cpu, gpu, tpu or auto.",
    "--trainer.devices N": "How many devices, or auto.",
    "--trainer.precision P": "32-true, bf16-mixed or 16-mixed.",
    "--trainer.max_epochs N": "For trainings that have no length of their own.",
    "--trainer.max_time T": "Stop after DD:HH:MM:SS.",
    "--trainer.fast_dev_run true": "Try one batch, and write nothing.",
}


def trainer_help(name: str, words: Sequence[str]) -> str:
    """The help of a command of Lightning's Trainer.

    Args:
        name: Of the command.
        words: Those after it, which may name a method, a data set and an attack.
    """
    words = expanded(words)
    parts = [f"usage: bdclean {name} -c FILE ... [--KEY VALUE ...]", TRAINER[name].does]
    chosen = {key: _chosen(key, kind, words) for key, kind in _KINDS.items()}
    parts += [_options_of(kind, key) for key, kind in chosen.items() if kind is not None]
    if chosen["model"] is None:
        methods = ", ".join(classes_of(LightningModule))
        parts.append(
            f"`bdclean {name} --model CLASS --help` shows the options of one of {methods}."
        )
    if chosen["data"] is None:
        sets = ", ".join(classes_of(LightningDataModule))
        parts.append(f"`bdclean {name} --data CLASS --help` shows the options of {sets}.")
    parts += [_table("the trainer:", _TRAINER_OPTIONS), _table("all commands:", _OWN)]
    return "\n\n".join(part if "\n" in part else fill(part, _WIDTH) for part in parts)


class _Short(DefaultHelpFormatter):
    """Leaves out types, which names, choices and defaults tell."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        layout: dict[str, Any] = {"width": _WIDTH, "max_help_position": 34} | kwargs
        super().__init__(*args, **layout)  # type: ignore[no-untyped-call]

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return "X"

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        return text if action.nargs == 0 else f"{text} (default: %(default)s)"


def _options_of(kind: type, key: str) -> str:
    parser = ArgumentParser(add_help=False, usage="", formatter_class=_Short)
    parser.add_class_arguments(kind, key, skip=_HIDDEN, fail_untyped=False)
    first = (getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    lines = parser.format_help().strip("\n").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"  --{key}."))
    shown = [line for line in lines[begin:] if "Path to a configuration file." not in line]
    return "\n".join([f"{kind.__name__}: {first}", *shown])


def _table(title: str, options: Mapping[str, str]) -> str:
    width = max(map(len, options))
    return "\n".join(
        [f"Of {title}", *(f"  {key:{width}}  {does}" for key, does in options.items())]
    )


def _chosen(key: str, base: type, words: Sequence[str]) -> type | None:
    """The class that files or words name for a key; None without one."""
    name = None
    for file in config_files(words):
        name = _named(read_yaml(file), key) or name
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in (f"--{key}", f"--{key}.class_path"):
            name = value if equals else after
    kind = None if name is None else classes_of(base).get(name) or find_class(name)
    return kind if isinstance(kind, type) else None


def _named(config: Any, key: str) -> str | None:
    first, _, rest = key.partition(".")
    value = config.get(first) if isinstance(config, dict) else None
    if rest:
        return _named(value.get("init_args"), rest) if isinstance(value, dict) else None
    name = value.get("class_path") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None
