"""Where a command works: what its `--run` and `--ckpt_path` stand for."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from bdclean import stopping
from bdclean.errors import ConfigError
from bdclean.files import SAFETENSORS
from bdclean.runs import LAST, RunFolder

_LIGHTNINGS = ("best", "hpc", "")
"""What Lightning takes for more than a file, or for none: nothing is selected on test data, and
`last` finds the checkpoint of a requeued job as well."""


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


def check_checkpoint(given: str | os.PathLike[str] | None, *, local: bool = True) -> None:
    """Refuses a checkpoint that is not there, before anything is made.

    Args:
        given: The value of `--ckpt_path`.
        local: Whether checkpoints are files of this machine; a user's plugin may read others.

    Raises:
        ConfigError: If it is no file, or a word other than `last`.
    """
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
    if local and os.path.isdir(given):  # noqa: PTH112  (of any length)
        raise ConfigError(
            f"--ckpt_path {given}: it is a folder; give the file, as checkpoints/last.ckpt of a "
            "run."
        )
    if local and not os.path.isfile(given):  # noqa: PTH113
        raise ConfigError(f"--ckpt_path {given}: there is no such file on this machine.")


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
    if stopping.is_first():
        print(f"There is no checkpoint in {run.path} yet, so the fit starts from scratch.")
    return None
