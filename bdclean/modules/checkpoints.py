"""Our entry in a checkpoint, and what is said of one that cannot be used."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from bdclean.errors import BdcleanError, ConfigError, WeightsError, behind, in_words

RECORD = "bdclean"
# What a checkpoint of Lightning consists of; a fit cannot go on without any of it.
_PARTS: dict[str, type[Any]] = {
    "epoch": int,
    "global_step": int,
    "state_dict": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_OF_GROUPS = ("loops", "callbacks")  # each of their values is a mapping as well
_READER = "checkpoint_connector.py"
_VERSION = "pytorch-lightning_version"
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, WeightsError)


def check_parts(checkpoint: Any, file: str) -> None:
    """Refuses a file that is no checkpoint of Lightning, or has parts of an odd type.

    Args:
        checkpoint: As torch has read it.
        file: What the user calls it.

    Raises:
        ConfigError: If it is.
    """
    if not isinstance(checkpoint, Mapping) or _VERSION not in checkpoint:
        raise ConfigError(
            f"{file} is no checkpoint of a run; give a weights file as --model.weights."
        )
    version, odd = checkpoint[_VERSION], None
    if not isinstance(version, str) or not re.match(r"\d+(\.\d+)*", version):
        odd = _VERSION
    for part, kind in _PARTS.items():
        value = checkpoint.get(part)
        fits = isinstance(value, kind) or value is None
        if fits and value and part in _OF_GROUPS:
            fits = all(isinstance(each, Mapping | None) for each in value.values())
        odd = odd if fits else part
    if odd is not None:
        raise ConfigError(f"{file}: {_none_of_ours(f'its entry {odd} is of a wrong type')}")


def check_complete(checkpoint: Mapping[str, Any], file: str, *, goes_on: bool) -> None:
    """Refuses a checkpoint that lacks a part.

    Args:
        checkpoint: As Lightning has read it.
        file: What the user calls it.
        goes_on: Whether a fit is to go on from it, which takes more than weights.

    Raises:
        ConfigError: If it does.
    """
    wanted = _PARTS if goes_on else ("state_dict",)
    missing = next((part for part in wanted if checkpoint.get(part) is None), None)
    if missing is not None:
        raise ConfigError(f"{file}: {_none_of_ours(f'its entry {missing} is missing')}")


def odd_state(error: BaseException, file: str) -> ConfigError | None:
    """What to say of an error within Lightning's reading of a checkpoint; None of another one."""
    if behind(error, BdcleanError) is not None or not isinstance(error, Exception):
        return None
    frames = (frame.f_code for frame, _ in walk_tb(error.__traceback__))
    if any(code.co_filename.endswith(_READER) and "restore" in code.co_name for code in frames):
        why = f"its state is odd ({type(error).__name__}: {in_words(error)})"
        return ConfigError(f"{file}: {_none_of_ours(why)}")
    return None


def _none_of_ours(why: str) -> str:
    return (
        f"{why}, so it is no whole checkpoint of a run of bdclean; take another one, or start a "
        "new run."
    )


def record_of(checkpoint: Mapping[str, Any], method: str, file: str) -> dict[str, Any]:
    """Our entry.

    Args:
        checkpoint: As Lightning has read it.
        method: The name of the one that is to go on.
        file: What the user calls it.

    Raises:
        ConfigError: If the checkpoint is of another method, or of an earlier version.
    """
    record = checkpoint.get(RECORD)
    if not isinstance(record, dict):
        raise ConfigError(
            f"{file}: the checkpoint is of an earlier version of bdclean, or not of a run of "
            "bdclean; start a new run. A model to start from comes in through --model.weights."
        )
    if record.get("method") != method:
        raise ConfigError(
            f"{file}: the checkpoint was written by {record.get('method')}, and this is {method}. "
            "A model to start from comes in through --model.weights."
        )
    return record


@contextmanager
def telling_damage(file: str) -> Iterator[None]:
    """Says in one sentence what an entry of odd content makes fail within the block.

    Raises:
        ConfigError: If something does.
    """
    try:
        yield
    except _DAMAGE as error:
        raise ConfigError(
            f"{file}: the checkpoint is damaged, or of another version of bdclean "
            f"({type(error).__name__}: {error}); start a new run."
        ) from error
