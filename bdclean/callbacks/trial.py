"""Lightning's development runs."""

from lightning.pytorch import Trainer


def is_trial(trainer: Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`, which must leave no trace."""
    return bool(vars(trainer)["fast_dev_run"])
