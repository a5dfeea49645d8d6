"""Nearest neighbours on the features of any backbone: a measure that trains nothing."""

from typing import Any

import torch
from torch import Tensor

from bdclean.backbones.head import KNNHead, cache_features
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.errors import ConfigError, check_positive
from bdclean.metrics.evaluation import BackdoorModule, Stage
from bdclean.metrics.fitting import scan
from bdclean.types import Batch, View


class KNN(BackdoorModule):
    """Classifies by the nearest features of the labelled images of the `probe` role.

    For `bdclean test` (and `validate`): there is nothing to fit and no model to export. A head in
    the weights file is not used. See `bdclean.backbones.head.KNNHead` for the vote.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Normalisation of foreign files; comes from the data module.
        std: As `mean`.
        weights: The file.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.
        k: Neighbours; all images where there are fewer.
        temperature: Of the weights of their votes.
        batch_size: Of the labelled images, per device.
    """

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        weights: str | None = None,
        arch: str | None = None,
        width: int | None = None,
        stem: Stem | None = None,
        k: int = 200,
        temperature: float = 0.1,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for key, number in ("k", k), ("batch_size", batch_size), ("temperature", temperature):
            check_positive(key, number)
        self.source = WeightsSource(weights, arch, width, input_size, mean, std, stem)
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.view = View("probe", batch_size=batch_size, labels=True)
        self.neighbours: KNNHead | None = None

    def setup(self, stage: str) -> None:
        """Reads the file.

        Raises:
            ConfigError: In a fit.
        """
        if stage == "fit":
            self.configure_optimizers()
        model = self.source.load()
        model.replace_head(None)
        self.model = model.to(memory_format=torch.channels_last).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Lightning asks for one before it calls `setup`."""

    def configure_optimizers(self) -> None:
        """Refuses, as `setup` does.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{type(self).__name__} has nothing to fit: use `bdclean test` with the same words."
        )

    def _begin(self, stage: Stage) -> None:
        """Takes the features of the labelled images before the counts begin."""
        self._start_counts(stage)
        batches = scan(self.trainer, self.view, self.device)
        features, labels = cache_features(self.model.features, batches)
        self.neighbours = KNNHead(features, labels, self.num_classes, self.k, self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), float32 in [0, 1], to (B, K), 1 for the class with most votes.

        Raises:
            ConfigError: Before an evaluation has begun.
        """
        if self.neighbours is None:
            raise ConfigError("There are no neighbours yet: they are found when evaluation begins.")
        votes: Tensor = self.neighbours(self.model.features(x))
        return votes

    def protocol(self) -> dict[str, Any]:
        """The neighbours carry clean labels."""
        facts = {"method": "knn", "head": "knn", "k": self.k, "labels": "clean"}
        return super().protocol() | facts
