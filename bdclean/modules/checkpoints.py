"""Our entry in a checkpoint, and what is said of one that cannot be used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bdclean.errors import ConfigError, WeightsError

RECORD = "bdclean"
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, WeightsError)


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
