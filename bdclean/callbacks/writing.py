"""Who of a run's processes writes, and where."""

from pathlib import Path

from lightning.pytorch import Trainer

from bdclean.modules.trainer import is_trial
from bdclean.runs import RunFolder


def run_to_write(trainer: Trainer, folder: str | None) -> RunFolder | None:
    """The run folder; None on all processes but the first, and in a development run.

    All processes call it: Lightning broadcasts the logger's folder.

    Args:
        trainer: Of the run.
        folder: The run folder; None takes the logger's, or else the Trainer's.
    """
    place = folder or trainer.log_dir
    if not trainer.is_global_zero or place is None or is_trial(trainer):
        return None
    return RunFolder(Path(place))
