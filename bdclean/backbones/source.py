"""Where a model under suspicion comes from."""

from dataclasses import dataclass
from pathlib import Path

from bdclean.backbones.build import load_model
from bdclean.backbones.own_network import name_network
from bdclean.backbones.split import SplitModel, Stem
from bdclean.checks import check_least
from bdclean.errors import ConfigError
from bdclean.types import RGB


@dataclass(frozen=True)
class WeightsSource:
    """A weights file, and what has to be known where the file does not say it.

    Attributes:
        weights: The file; None where a checkpoint of our own is to come.
        arch: Architecture, for foreign files; our own files name theirs.
        width: Channels of the first layer, for foreign files; None takes 64.
        input_size: Side of the images; must be the one the file was made for, if it says so.
        mean: Normalisation of a foreign file, per channel. Our own files carry theirs, which
            counts even where the images at hand have other statistics.
        std: As `mean`.
        stem: Of ResNets, for foreign files; None takes `auto`: the CIFAR stem up to 64 pixels.

    Raises:
        ConfigError: If the width is below 1, or `arch` names a network of the user's own that is
            not there.
    """

    weights: str | None
    arch: str | None
    width: int | None
    input_size: int
    mean: RGB
    std: RGB
    stem: Stem | None = None

    def __post_init__(self) -> None:
        """Checks the width, and imports a network of the user's own."""
        name_network(self.arch)
        if self.width is not None:
            check_least("width", self.width, 1)

    @property
    def is_there(self) -> bool:
        """Whether the file exists."""
        return self.weights is not None and Path(self.weights).is_file()

    def load(self) -> SplitModel:
        """Loads the model, in training mode and on the CPU.

        Raises:
            ConfigError: If no file was given, or an argument contradicts it.
            WeightsError: If the file cannot be read safely or does not fit.
        """
        if self.weights is None:
            raise ConfigError(
                "model.weights is not set: give the weights file of the model to start from."
            )
        return load_model(
            self.weights,
            arch=self.arch,
            width=self.width,
            input_size=self.input_size,
            stem=self.stem,
            usual=(self.mean, self.std),
        )
