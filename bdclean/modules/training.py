"""A training whose length is the Trainer's: `trainer.max_epochs` or `trainer.max_steps`."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from bdclean.checks import MOST_FLOAT
from bdclean.errors import ConfigError, in_a_sentence, in_words
from bdclean.modules.base import BackdoorModule
from bdclean.modules.checkpoints import named_checkpoint
from bdclean.modules.reading import data_of, share_buffers, steps_per_epoch
from bdclean.modules.trainer import is_fitting
from bdclean.types import View, ViewableData


class Training(BackdoorModule):
    """Trains one network on one view, and keeps its length when it is resumed.

    Schedulers restore the length that they were made for, so a fit that became longer would go on
    at the end of its schedule, or beyond it.

    Attributes:
        view: What is read.
        any_length: Whether nothing depends on the length.
        trained: Whether a fit has begun, here or in the run that was restored.
    """

    view: View
    any_length = False
    trained = False

    def __init__(self) -> None:
        super().__init__()
        self._steps: float | None = None
        self._steps_before: float | None = None

    def setup(self, stage: str) -> None:
        """Asks the data module for the view, where it can serve views."""
        if stage != "fit":
            return
        self.trained, self._steps_before = True, None
        if isinstance(data_of(self.trainer), ViewableData):
            self.request(self.view)

    def configure_model(self) -> None:
        """As of any module, and counts the steps of an epoch, before Lightning does.

        Raises:
            ConfigError: As of any module, or the Trainer validates after more batches than an epoch
                has.
        """
        super().configure_model()
        fits = self._trainer is not None and is_fitting(self.trainer)
        if fits and isinstance(data_of(self.trainer), ViewableData):
            steps_per_epoch(self.trainer, self.view)

    def on_fit_start(self) -> None:
        """Compares the length with that of the run that is resumed.

        Raises:
            ConfigError: If they differ.
        """
        before, self._steps = self._steps_before, self.trainer.estimated_stepping_batches
        if not self.any_length and before not in (None, self._steps):
            raise ConfigError(
                f"{named_checkpoint(self.trainer)}: the checkpoint's run is {before} steps long, "
                f"and this one {self._steps}. Resume with what gave it that length (epochs or "
                "max_steps, devices, batch size), or start a new run from its weights "
                "(--model.weights)."
            )
        super().on_fit_start()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """As Lightning's, with what the user's optimizer says of a network that it cannot train.

        Raises:
            ConfigError: If it fails once it has the gradients.
        """
        ready = False

        def closure() -> Any:
            nonlocal ready
            ready = False
            loss = None if optimizer_closure is None else optimizer_closure()
            ready = True
            return loss

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if not ready or isinstance(error, torch.OutOfMemoryError):
                raise
            name = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise ConfigError(
                f"optimizer={name}: it cannot train this network ({in_words(error)})."
            ) from error

    def on_train_end(self) -> None:
        """Gives all processes the statistics of the first one, whose model is saved."""
        share_buffers(self.model)

    def kept(self) -> dict[str, Any]:
        """The length."""
        return {"steps": self._steps}

    def restore_kept(self, record: dict[str, Any]) -> None:
        """Reads the length."""
        self.trained, self._steps_before = True, record["steps"]


def user_optimizer(make: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """The optimizer that the user chose.

    Raises:
        ConfigError: If it refuses its settings, one of them is no finite number or too large, or
            it computes the loss several times in a step.
    """
    try:
        optimizer = make(parameters)
    except ValueError as error:
        raise ConfigError(f"model.optimizer: {in_a_sentence(error)}") from error
    for key, value in optimizer.defaults.items():
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(math.isfinite(each) for each in numbers if isinstance(each, float)):
            raise ConfigError(f"model.optimizer.{key}={value}: it must be a finite number.")
        if any(isinstance(each, float) and abs(each) > MOST_FLOAT for each in numbers):
            raise ConfigError(f"model.optimizer.{key}={value}: it must be at most {MOST_FLOAT:g}.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: it computes the loss several times in a "
            "step, which a training in batches cannot serve; take another one, as torch.optim.SGD."
        )
    return optimizer
