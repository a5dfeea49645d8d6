"""Training whose learning rate follows a schedule over the whole fit."""

import math
from typing import Any

from bdclean.errors import ConfigError
from bdclean.metrics.evaluation import BackdoorModule

_STEPS = "bdclean_steps"  # our entry in a checkpoint


class ScheduledTraining(BackdoorModule):
    """A fit that has a length from the start, and keeps it when it is resumed.

    Schedulers restore the length that they were made for, so a fit that became longer would go on
    at the end of its schedule, or beyond it.

    Attributes:
        stretchable: Whether the schedule is the same for any length.
    """

    stretchable = False

    def __init__(self) -> None:
        super().__init__()
        self._steps: int | None = None
        self._steps_before: int | None = None

    def total_steps(self) -> int:
        """Optimizer steps of the whole fit.

        Raises:
            ConfigError: If it has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError(
                "trainer.max_epochs=-1: the learning rate follows a schedule over the whole "
                "training, which needs an end; set trainer.max_epochs or trainer.max_steps."
            )
        self._steps = int(steps)
        return self._steps

    def on_train_start(self) -> None:
        """Compares the length with that of the run that is resumed.

        Raises:
            ConfigError: If they differ.
        """
        super().on_train_start()
        before, now = self._steps_before, self._steps
        if not self.stretchable and before is not None and before != now:
            raise ConfigError(
                f"The checkpoint's run has a schedule over {before} steps, and this one has {now}. "
                "Resume with the length it had (trainer.max_epochs, devices, batch size), or start "
                "a new run from its weights (model.weights)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the length."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STEPS] = self._steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reads the length."""
        super().on_load_checkpoint(checkpoint)
        self._steps_before = checkpoint.get(_STEPS)
