"""The bound of all defences of a poisoned training set: training on its truly clean part."""

from dataclasses import replace

from bdclean.errors import ConfigError
from bdclean.modules.reading import data_of
from bdclean.training.supervised import Supervised
from bdclean.types import KnowsTruth, Subset, ViewableData


class CleanPart(Supervised):
    """`Supervised` on the samples of the `train` role that are neither poisoned nor covers.

    It reads the ground truth, which only an attack of ours has: a bound to compare with, no
    defence. Arguments are those of `Supervised`.
    """

    name = "clean part"

    def setup(self, stage: str) -> None:
        """Asks the data module for the clean samples with their labels.

        Raises:
            ConfigError: If nobody knows which samples are poisoned, or all are.
        """
        super().setup(stage)
        data = data_of(self.trainer)
        if stage != "fit" or not isinstance(data, ViewableData):
            return
        truth = data.training_set() if isinstance(data, KnowsTruth) else None
        if truth is None or truth.poisoned is None or truth.covers is None:
            raise ConfigError(
                "data.attack: training on the clean part needs an attack that poisons fixed "
                "samples; give one, or use bdclean.training.Supervised."
            )
        clean = (~(truth.poisoned | truth.covers)).nonzero().flatten()
        if not len(clean):
            raise ConfigError("data.attack: no sample is clean; lower its rate.")
        data.set_view(replace(self.view, subset=Subset(clean)))
