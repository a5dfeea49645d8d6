"""How a defence of a training set trains a network."""

from dataclasses import dataclass

from bdclean.errors import ConfigError
from bdclean.functional.schedules import Schedule
from bdclean.types import AugmentationName


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained from new weights: SGD on the cross-entropy.

    Attributes:
        epochs: At least 1.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        nesterov: Of SGD.
        schedule: Over the whole training.
        milestones: For `multistep`, as fractions of the training.
        batch_size: Per device.
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
            if value < least:
                raise ConfigError(f"{name}={value} of a recipe: it must be at least {least}.")
        if self.nesterov and not self.momentum:
            raise ConfigError(
                "nesterov=true of a recipe needs a momentum above 0; raise it, or set nesterov to "
                "false."
            )
