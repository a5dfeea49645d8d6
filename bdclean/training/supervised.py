"""Supervised training, on clean or on poisoned data: how victims and clean models are made."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.build import start_from
from bdclean.backbones.split import Stem
from bdclean.checks import check_between, check_fractions, check_not_negative, check_positive
from bdclean.errors import ConfigError
from bdclean.functional.schedules import Schedule, make_schedule
from bdclean.modules import Needs, Training
from bdclean.modules.base import Classifier, Split
from bdclean.modules.trainer import total_steps
from bdclean.modules.training import user_optimizer
from bdclean.types import AugmentationName, Batch, ImageFacts, View


class Supervised(Training):
    """Cross-entropy training of a classifier on the `train` role and the labels it shows.

    Defaults are the recipe of the public code of ANP (Wu and Wang, NeurIPS 2021), with a
    cosine schedule: SGD 0.1, momentum 0.9, weight decay 5e-4, batch 128, crop and flip.

    Args:
        facts: Facts of the data.
        arch: See `bdclean.backbones.build`. None takes that of `weights`, or resnet18.
        width: Channels of the first block of our ResNets. None takes that of `weights`, or 64,
            the standard net.
        stem: None takes that of `weights`, or `auto`: the CIFAR stem up to 64 pixels.
        weights: Start from this file instead of a fresh initialisation.
        batch_size: Images per step on all devices together.
        augmentation: Applied on the device.
        optimizer: Any torch optimizer, from YAML.
        schedule: Learning-rate schedule over the whole training.
        milestones: For `multistep`, as fractions of the training.
        gamma: For `multistep`.
        label_smoothing: Of the cross-entropy.
    """

    name = "supervised"
    needs = Needs(labels=("train",), images="train")
    can_average = True

    def __init__(
        self,
        facts: ImageFacts,
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
        self.save_arguments("optimizer")
        check_positive("batch_size", batch_size)
        check_fractions("milestones", milestones)
        check_not_negative("gamma", gamma)
        check_between("label_smoothing", label_smoothing, 0, 1)
        self.optimizer = optimizer
        self.any_length = schedule == "constant"
        self.schedule, self.milestones, self.gamma = schedule, milestones, gamma
        self.label_smoothing = label_smoothing
        self.view = View("train", augmentation, batch_size=batch_size, labels=True)
        self.weights = weights
        self.install(model=start_from(facts, facts.num_classes, arch, width, stem, weights))

    def setup(self, stage: str) -> None:
        """Asks the data module for training images with their labels."""
        super().setup(stage)
        if stage == "fit":
            self.model.head_is_drawn = False  # it is trained from here on

    def begin_evaluation(self, split: Split) -> dict[str, Classifier]:
        """The model.

        Raises:
            ConfigError: If it, or its head, has never been trained.
        """
        classifiers = super().begin_evaluation(split)
        if not self.trained and self.weights is None:
            raise ConfigError(
                f"{type(self).__name__} has not been trained, and there are no weights: give a "
                "weights file with --model.weights, or a checkpoint of one of your runs with "
                "--ckpt_path (`last` with the --run of that fit)."
            )
        if self.model.head_is_drawn:
            raise ConfigError(
                f"weights={self.weights}: the file has no classifier for the "
                f"{self.model.info.num_classes} classes of this data, so there is nothing to "
                "measure: train one on it with `-c measure/linear_probe` and --model.weights set "
                "to this file, or give the data set that it was made for."
            )
        return classifiers

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, in float32."""
        if "label" not in batch:
            raise ConfigError("Supervised training needs labels, and this data shows none.")
        logits = self(batch["image"]).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        self.log_terms(loss=loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule per step over the whole training."""
        optimizer = user_optimizer(self.optimizer, self.model.parameters())
        scheduler = make_schedule(
            optimizer,
            self.schedule,
            1 if self.any_length else total_steps(self.trainer),
            self.milestones,
            self.gamma,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
