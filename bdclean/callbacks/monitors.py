"""Looks after the first epoch whether the metrics are there that callbacks wait for."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from bdclean.errors import ConfigError
from bdclean.modules.trainer import has_validated


class Monitors(Callback):
    """Refuses a monitored metric that nothing logs.

    Lightning would train on and save no checkpoint, or end with an error of its own.

    Args:
        theirs: Callbacks of the user; others are made of `--checkpoint`.
    """

    def __init__(self, theirs: Sequence[Callback] = ()) -> None:
        self._theirs = list(theirs)
        self._looked = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks once, as soon as validation has had its turn.

        Raises:
            ConfigError: If a metric is not there.
        """
        if self._looked or not has_validated(trainer):
            return
        self._looked = True
        known = sorted(trainer.callback_metrics)
        for callback in vars(trainer)["callbacks"]:
            name = _monitored(callback)
            if name is None or name in known:
                continue
            section = "trainer.callbacks" if callback in self._theirs else "checkpoint"
            listed = f"there are {', '.join(known)}" if known else "there is none"
            raise ConfigError(
                f"--{section}.monitor={name}: {type(callback).__name__} waits for a metric that "
                f"nothing logs; {listed}."
            )


def _monitored(callback: Callback) -> str | None:
    """The metric that a callback cannot do without; None where it needs none."""
    if isinstance(callback, EarlyStopping) and not callback.strict:
        return None
    if isinstance(callback, EarlyStopping | ModelCheckpoint):
        return callback.monitor
    return None
