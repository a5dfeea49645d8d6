"""Nearest neighbours on the features of any backbone: a measure that trains nothing."""

from typing import Any

from torch import Tensor

from bdclean.backbones.head import KNNHead, cache_features
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.checks import check_positive
from bdclean.errors import ConfigError
from bdclean.modules import BackdoorModule, Needs
from bdclean.modules.base import Classifier, Split
from bdclean.types import Batch, ImageFacts, View


class KNN(BackdoorModule):
    """Classifies by the nearest features of the labelled images of the `probe` role.

    For `bdclean test` (and `validate`): there is nothing to fit and no model to export. A head in
    the weights file is not used. See `bdclean.backbones.head.KNNHead` for the vote.

    Args:
        facts: Facts of the data.
        weights: The file.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.
        k: Neighbours; all images where there are fewer.
        temperature: Of the weights of their votes.
        batch_size: Of the labelled images, per device.
    """

    name = "knn"
    needs = Needs(labels=("clean",), images="probe")

    def __init__(
        self,
        facts: ImageFacts,
        weights: str | None = None,
        arch: str | None = None,
        width: int | None = None,
        stem: Stem | None = None,
        k: int = 200,
        temperature: float = 0.1,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.save_arguments()
        for key, number in ("k", k), ("batch_size", batch_size), ("temperature", temperature):
            check_positive(key, number)
        self.source = WeightsSource(
            weights, arch, width, facts.input_size, facts.mean, facts.std, stem
        )
        self.num_classes, self.k, self.temperature = facts.num_classes, k, temperature
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
        self.install(model=model.requires_grad_(False))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Lightning asks for one before it calls `setup`."""

    def configure_optimizers(self) -> None:
        """Refuses, as `setup` does.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{type(self).__name__} has nothing to fit: use `bdclean test` with the same arguments."
        )

    def begin_evaluation(self, split: Split) -> dict[str, Classifier]:
        """Takes the features of the labelled images before the counts begin."""
        features, labels = cache_features(self.model.features, self.read(self.view))
        self.neighbours = KNNHead(features, labels, self.num_classes, self.k, self.temperature)
        return {"": self}

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), float32 in [0, 1], to (B, K), 1 for the class with most votes.

        Raises:
            ConfigError: Before an evaluation has begun.
        """
        if self.neighbours is None:
            raise ConfigError("There are no neighbours yet: they are found when evaluation begins.")
        votes: Tensor = self.neighbours(self.model.features(x))
        return votes

    def details(self) -> dict[str, Any]:
        """The neighbours stand for a head."""
        return {"head": "knn", "k": self.k}
