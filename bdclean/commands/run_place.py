"""Where a command works: what `--run` and `--ckpt_path` stand for, and what reads the latter."""

import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.strategies import Strategy

from bdclean import stopping
from bdclean.errors import ConfigError
from bdclean.files import SAFETENSORS
from bdclean.modules.checkpoints import check_there
from bdclean.runs import LAST, RunFolder

_LIGHTNINGS = ("best", "hpc", "")
"""What Lightning takes for more than a file, or for none: nothing is selected on test data, and
`last` finds the checkpoint of a requeued job as well."""

_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def require_words(name: str, words: Sequence[str]) -> None:
    """Refuses an evaluation of nothing.

    Raises:
        ConfigError: If there are no words.
    """
    if not words:
        raise ConfigError(f"{name}: name a run, as --run RUN, or give data and a method with -c.")


def check_run(words: Sequence[str]) -> None:
    """Refuses an evaluation of a folder that holds no run, where nothing else gives the data.

    Args:
        words: Of the command, with the config of the run as far as there is one; see `of_run`.

    Raises:
        ConfigError: If the folder or its config is missing.
    """
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    given |= {word: after for word, after in pairwise(words) if word == "--run"}
    run = given.get("--run")
    if run is None or words[-1] == "--run":  # which lacks its value
        return
    if given.keys() & {"-c", "--config", "--data", "--data.class_path"}:
        return
    if os.path.isfile(run):  # noqa: PTH113  (of any length)
        lacks = "it is a file"
    else:
        there = os.path.isdir(run)  # noqa: PTH112
        lacks = "there is no config.yaml in it" if there else "there is no such folder"
    raise ConfigError(
        f"--run {run or repr(run)}: {lacks}; give a folder that `bdclean fit` wrote, or data and a "
        "method with -c."
    )


def check_plugins(plugins: Iterable[object], strategy: object = None) -> None:
    """Refuses Lightning's readers of checkpoints, which unpickle, and fetch from the network.

    A class of the user's own may be one as well: it is code that the user runs.

    Args:
        plugins: As the config gives them.
        strategy: As well; it may have a reader of its own.

    Raises:
        ConfigError: If there is such a one.
    """
    readers = [("trainer.plugins", plugin) for plugin in plugins]
    own = getattr(strategy, "_checkpoint_io", None)
    for key, plugin in [*readers, ("trainer.strategy.checkpoint_io", own)]:
        if isinstance(plugin, CheckpointIO) and _is_lightnings(plugin):
            raise ConfigError(
                f"{key}: {type(plugin).__name__} can unpickle checkpoints, which runs "
                "what is in them, and fetch them from the network; leave it out."
            )


def check_strategy(strategy: Strategy) -> None:
    """Refuses to read a checkpoint by a strategy that does it in a way of its own.

    Raises:
        ConfigError: If Lightning's does.
    """
    if type(strategy).load_checkpoint is not Strategy.load_checkpoint and _is_lightnings(strategy):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} unpickles checkpoints, which runs what "
            "is in them; take --trainer.strategy ddp, or start without --ckpt_path."
        )


def are_lightnings(plugins: object) -> bool:
    """Whether all plugins of a config are of Lightning; others may read checkpoints elsewhere."""
    several = plugins if isinstance(plugins, list | tuple) else [plugins]
    paths = [getattr(each, "class_path", None) for each in several if each is not None]
    return all(path is None or path.partition(".")[0] in _LIGHTNING for path in paths)


def _is_lightnings(plugin: object) -> bool:
    return type(plugin).__module__.partition(".")[0] in _LIGHTNING


def check_checkpoint(
    given: str | os.PathLike[str] | None, *, weights_only: bool | None = None, local: bool = True
) -> None:
    """Refuses a checkpoint that is not there, before anything is made, or that is unpickled.

    Args:
        given: The value of `--ckpt_path`.
        weights_only: That of `--weights_only`; False asks Lightning to unpickle.
        local: Whether checkpoints are files of this machine; a user's plugin may read others.

    Raises:
        ConfigError: If it is no file, or a word other than `last`, or to be unpickled.
    """
    if weights_only is False:
        raise ConfigError("--weights_only=False: checkpoints are never unpickled; leave it out.")
    if given is None or given == LAST:
        return
    if str(given) in _LIGHTNINGS:
        raise ConfigError(
            f"--ckpt_path={str(given)!r}: give a checkpoint file, as RUN/checkpoints/last.ckpt, or "
            "`last` for the newest one of the run."
        )
    if str(given).endswith(SAFETENSORS):
        raise ConfigError(
            f"--ckpt_path {given}: it holds weights alone; give it with --model.weights."
        )
    if local:
        check_there(given)


def run_folder(command: str, run: str, checkpoint: str | None) -> RunFolder:
    """Where a command writes: `--run`, or the folder of the run that is evaluated.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        run: The value of `--run`.
        checkpoint: The value of `--ckpt_path`.

    Raises:
        ConfigError: If `--run` names no folder.
    """
    place = Path(run)
    above = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not place.name or not above.is_dir():
        raise ConfigError(f"--run={str(place)!r}: name a folder, new or of a run.")
    evaluated = None
    if command != "fit" and checkpoint is not None:
        evaluated = RunFolder.of_checkpoint(checkpoint)
    return evaluated or RunFolder(place)


def newest_checkpoint(command: str, run: RunFolder) -> str | None:
    """What `--ckpt_path last` means to Lightning; None where a fit starts from scratch.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        run: The run that goes on, or is evaluated.

    Raises:
        ConfigError: If there is nothing to evaluate.
    """
    newest = run.newest_checkpoint()
    if newest is not None:  # that of a requeued job, if it is the newer one
        return str(newest) if newest.name.startswith("hpc_ckpt_") else LAST
    if command != "fit":
        raise ConfigError(f"--ckpt_path last: {run.path} holds no checkpoint.")
    if run.is_finished:
        raise ConfigError(
            f"--ckpt_path last: {run.path} holds this run, which has ended, and no checkpoint; "
            "name another folder with --run."
        )
    if stopping.is_first():
        print(f"There is no checkpoint in {run.path} yet, so the fit starts from scratch.")
    return None
