"""`bdclean fit --help`: the options of the chosen method, data set and attack, and the usual ones.

Lightning's own help lists several hundred options of everything; `--help_all` shows it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bdclean.commands import TRAINER
from bdclean.commands.class_help import asked_for, chosen_name, class_page, options_of, values_of
from bdclean.commands.help_page import page, shown, table
from bdclean.commands.hints import no_class
from bdclean.commands.own_modules import failure
from bdclean.commands.rooms import BASES, arguments_of, base_of, classes_of, named_class
from bdclean.commands.words import expanded, of_run
from bdclean.errors import ConfigError
from bdclean.modules import StagedModule, Training

_ALL = {
    "-c FILE, --config FILE": "A config, a name or a file; several stack, and later ones win.",
    "--run FOLDER": "Folder that the run writes into. (default: runs/last)",
    "--ckpt_path FILE": "A checkpoint to go on with or to measure; `last` is the newest of --run.",
    "--seed_everything N": "Seed of all that is drawn in training. (default: 0)",
    "--test_after_fit {true,false}": "Measure ACC, ASR and PA at the end of a fit. (default: true)",
    "--print_config": "Print the merged config, and do nothing.",
    "--model.help CLASS": "The options of a method; so do --data.help and --data.attack.help.",
    "--help_all": "All options, those of Lightning's Trainer and checkpoints among them.",
}
_OF_TRAINER = {
    "--trainer.accelerator NAME": "cpu, gpu, tpu or auto.",
    "--trainer.devices N": "How many devices, or auto.",
    "--trainer.precision P": "32-true, bf16-mixed or 16-mixed.",
    "--trainer.max_epochs N": "For trainings that have no length of their own.",
    "--trainer.max_time T": "Stop after DD:HH:MM:SS.",
    "--trainer.fast_dev_run true": "Try one batch, and write nothing.",
}
_ONLY_FIT = (
    *("--seed_everything", "--test_after_fit", "--trainer.max_epochs", "--trainer.max_time"),
)
_OF_RUN = "Config and checkpoint of a run: `--run FOLDER` alone takes both from there."
_HELD_OUT = "It reads the images that the fit held out with --data.splits.val N."
_NETWORK = ("weights", "arch", "width", "stem")
"""What is asked of a method that trains, where nothing is trained."""
_OF_TRAINING = {
    *("defense_root", "defense_labels", "validate_in_fit", "shuffle_seed"),
    *("rate", "rate_base", "exclude_target", "seed"),
}
"""Arguments of data and attacks that change nothing where nothing is trained."""
_EXAMPLES = {
    "fit": "bdclean fit -c trainer/cpu -c data/digits -c attack/badnets/digits "
    "-c train/supervised/digits --model.width 16 --run runs/victim",
    "validate": "bdclean validate --run runs/victim",
    "test": "bdclean test --run runs/victim",
    "predict": "bdclean predict --run runs/victim",
}
_MORE = "docs/getting_started.md; `bdclean config ls` lists the configs"


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether words ask for the help of a command or of a class."""
    return bool({"-h", "--help"} & set(words)) or asked_for(words) is not None


def trainer_help(name: str, words: Sequence[str]) -> str:
    """The help of a command of Lightning's Trainer, or of a class.

    Args:
        name: Of the command.
        words: Those after it, which may name a method, a data set and an attack.

    Raises:
        ConfigError: If there is no such config or class.
    """
    words = expanded(words if name == "fit" else of_run(words))
    if asked_for(words) is not None:
        return class_page(name, words)
    values = values_of(words)
    sections = []
    for key in BASES:
        named = chosen_name(key, words)
        kind = None if named is None else named_class(named, base_of(key))
        if kind is None and named is not None:
            raise ConfigError(failure() or f"--{key}={named}: {no_class(named, [base_of(key)])}")
        if kind is not None:
            sections += options_of(kind, key, values, only=_kept(name, key, kind))
        elif key in ("model", "data"):
            classes = ", ".join(classes_of(base_of(key)))
            sections.append(f"`bdclean {name} --{key}.help CLASS` shows the options of {classes}.")
    for title, rows in ("Of the trainer:", _OF_TRAINER), ("Of all commands:", _ALL):
        kept = {
            option: _with_value(option, text, values)
            for option, text in rows.items()
            if name == "fit" or not option.startswith(_ONLY_FIT)
        }
        sections.append(table(title, kept))
    sections += [] if name == "fit" else [_OF_RUN]
    sections += [_HELD_OUT] if name == "validate" else []
    usage = f"bdclean {name} -c FILE ... [--KEY VALUE ...]"
    return page(usage, TRAINER[name].does, sections, _EXAMPLES[name], _MORE)


def _kept(name: str, key: str, kind: type) -> Collection[str]:
    """Names of the arguments that matter to a command; none are all."""
    if name == "fit":
        return ()
    if key == "model":
        return _NETWORK if issubclass(kind, Training | StagedModule) else ()
    idle = _OF_TRAINING if name == "validate" else _OF_TRAINING | {"splits"}
    return {argument.split(".")[0] for argument in arguments_of(kind)} - idle


def _with_value(option: str, text: str, values: Mapping[str, Any]) -> str:
    """The text of an option, with what configs set."""
    key = option.split(" ")[0].removeprefix("--")
    if key not in values:
        return text
    return f"{text.partition(' (default')[0]} (default: {shown(values[key])})"
