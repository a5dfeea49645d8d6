"""How a network is trained for some epochs: optimizer, schedule, batches, augmentation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from bdclean.checks import check_choice, check_fractions, check_least
from bdclean.errors import ConfigError
from bdclean.functional.schedules import Schedule, make_schedule
from bdclean.modules.reading import steps_per_epoch
from bdclean.types import AugmentationName, Role, View


@dataclass(frozen=True)
class Recipe:
    """SGD for some epochs.

    Attributes:
        epochs: At least 1.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        nesterov: Of SGD.
        schedule: Of the learning rate, over these epochs.
        milestones: For `multistep`, as fractions of these epochs.
        batch_size: Of a step, on all devices together.
        augmentation: On the device.

    Raises:
        ConfigError: If a value is out of its range.
    """

    epochs: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    batch_size: int = 128
    augmentation: AugmentationName = "weak"

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, value, least in (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("lr", self.lr, 0),
            ("momentum", self.momentum, 0),
            ("weight_decay", self.weight_decay, 0),
        ):
            check_least(name, value, least)
        check_choice("schedule", self.schedule, Schedule)
        if self.momentum >= 1:
            raise ConfigError(f"momentum={self.momentum}: it must be below 1.")
        check_fractions("milestones", self.milestones)
        if self.nesterov and not self.momentum:
            raise ConfigError(
                "nesterov=true: it needs a momentum above 0; raise that, or set nesterov to false."
            )

    def view(self, role: Role, **more: Any) -> View:
        """Images of a role in its batches, under its augmentation; `more` as of a `View`."""
        return View(role, self.augmentation, batch_size=self.batch_size, **more)

    def sgd(self, parameters: Iterable[Parameter]) -> SGD:
        """The optimizer."""
        return SGD(
            parameters,
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

    def scheduled(
        self,
        optimizer: Optimizer,
        trainer: Trainer,
        view: View,
        per: Literal["step", "epoch"] = "step",
    ) -> OptimizerLRSchedulerConfig:
        """The optimizer with the recipe's schedule.

        Args:
            optimizer: Its rates are those that the schedule starts from.
            trainer: Knows how many steps an epoch has.
            view: What the epochs read.
            per: `epoch` suits the last training stage of a plan only: Lightning steps epoch
                schedules after `on_train_epoch_end`, where the next stage has put its own in place.
        """
        length = self.epochs
        if per == "step":
            length *= steps_per_epoch(trainer, view)
        schedule = make_schedule(optimizer, self.schedule, length, self.milestones)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": per},
        }
