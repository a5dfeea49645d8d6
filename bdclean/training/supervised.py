"""Supervised training, on clean or on poisoned data: how victims and clean models are made."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.build import start_from
from bdclean.backbones.split import Stem
from bdclean.errors import ConfigError, check_positive
from bdclean.functional.schedules import Schedule, make_schedule
from bdclean.metrics.evaluation import BackdoorModule
from bdclean.metrics.evaluation import Stage as EvaluationStage
from bdclean.metrics.fitting import FixedLength, own_optimizer, share_buffers, total_steps
from bdclean.types import AugmentationName, Batch, View, ViewableData


class Supervised(FixedLength, BackdoorModule):
    """Cross-entropy training of a classifier on the `train` role and the labels it shows.

    Defaults are the recipe of the public code of ANP (Wu and Wang, NeurIPS 2021), with a
    cosine schedule: SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, crop and flip.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Per channel; comes from the data module.
        std: Per channel; comes from the data module.
        arch: See `bdclean.backbones.build`. None takes that of `weights`, or resnet18.
        width: Channels of the first stage of our ResNets. None takes that of `weights`, or 64,
            the standard net.
        stem: None takes that of `weights`, or `auto`: the CIFAR stem up to 64 pixels.
        weights: Start from this file instead of a fresh initialisation.
        batch_size: Images per step and device.
        augmentation: Applied on the device.
        optimizer: Any torch optimizer, from YAML.
        schedule: Learning-rate schedule over the whole training.
        milestones: For `multistep`, as fractions of the training.
        gamma: For `multistep`.
        label_smoothing: Of the cross-entropy.
    """

    can_average = True

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arch: str | None = None,
        width: int | None = None,
        stem: Stem | None = None,
        weights: str | None = None,
        batch_size: int = 128,
        augmentation: AugmentationName = "weak",
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=5e-4
        ),
        schedule: Schedule = "cosine",
        milestones: list[float] = [0.5, 0.75],  # noqa: B006  (never written to)
        gamma: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        check_positive("batch_size", batch_size)
        if not 0 <= label_smoothing <= 1:
            raise ConfigError(f"label_smoothing={label_smoothing}: it must be between 0 and 1.")
        self.optimizer = optimizer
        self.stretchable = schedule == "constant"
        self.schedule, self.milestones, self.gamma = schedule, milestones, gamma
        self.label_smoothing = label_smoothing
        self.view = View("train", augmentation, batch_size=batch_size, labels=True)
        self.weights = weights
        facts = (num_classes, input_size, mean, std)
        model = start_from(*facts, arch, width, stem, weights)
        self.model = model.to(memory_format=torch.channels_last)

    def setup(self, stage: str) -> None:
        """Asks the data module for training images with their labels."""
        super().setup(stage)
        if stage == "fit":
            self.model.head_is_drawn = False  # it is trained from here on
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, ViewableData):
            data.set_view(self.view)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The head is restored along with the rest."""
        super().on_load_checkpoint(checkpoint)
        self.model.head_is_drawn = False

    def _begin(self, stage: EvaluationStage) -> None:
        super()._begin(stage)
        if self.model.head_is_drawn:
            raise ConfigError(
                f"{self.weights} has no classifier for the {self.model.info.num_classes} classes "
                "of this data, so there is nothing to measure: train one on it with "
                "-c measure/linear_probe and model.weights set to this file, or give the "
                "data set that it was made for."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, in float32."""
        if "label" not in batch:
            raise ConfigError("Supervised training needs labels, and this data shows none.")
        logits = self(batch["image"]).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def on_train_end(self) -> None:
        """Gives all processes the statistics of the first one, whose model is saved."""
        share_buffers(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule per step over the whole training."""
        optimizer = own_optimizer(self.optimizer, self.model.parameters())
        scheduler = make_schedule(
            optimizer,
            self.schedule,
            1 if self.stretchable else total_steps(self.trainer),
            self.milestones,
            self.gamma,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def protocol(self) -> dict[str, Any]:
        """Evaluated with its own head; trained on the labels that the data set shows."""
        return super().protocol() | {"method": "supervised", "labels": "train"}
