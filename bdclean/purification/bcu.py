"""Backdoor cleansing with unlabelled data (BCU).

Pang, Sun, Ling, Chen: Backdoor Cleansing with Unlabeled Data. CVPR 2023; the authors' code is
github.com/luluppang/BCU. The suspect is the teacher. The student starts from the suspect's
weights, a random part of which is drawn anew, more of them the deeper the layer:

    W_student = m * W_suspect + (1 - m) * W_fresh,   m ~ Bernoulli(1 - r) element-wise     (3)

and learns the teacher's outputs z_T on unlabelled images, in epoch e of E:

    T = 1 + 3 (e + 1) / E
    L = KL(softmax(z_T / T) || softmax(z_S / T)), mean over the batch, without a factor T^2

docs/methods/bcu.md lists every default with its source.
"""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from bdclean.backbones import SplitModel, build
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.backbones.stages import ordered_stages
from bdclean.errors import ConfigError, check_not_negative, check_positive
from bdclean.functional.distillation import hard_label_loss, rising_temperature, tempered_kl
from bdclean.functional.reinitialisation import (
    Strategy,
    maskable_count,
    mix_weights_,
    overall_fraction,
    stage_ratios,
)
from bdclean.functional.schedules import make_schedule
from bdclean.functional.seeds import derive_seed
from bdclean.metrics.fitting import FixedLength
from bdclean.purification.base import Purifier, check_choice
from bdclean.types import AugmentationName, Batch, View

LabelKind = Literal["soft", "hard"]
TemperatureSchedule = Literal["rising", "constant"]
BCUSchedule = Literal["cosine", "constant"]


class BCU(FixedLength, Purifier):
    """Re-initialises by depth, then distils. Defaults are those of the authors' code.

    Args:
        num_classes: Of the data module; the model keeps the classes of its own head.
        input_size: Side of the images; comes from the data module.
        mean: Normalisation of foreign files; comes from the data module.
        std: As `mean`.
        weights: The suspect file; it must hold a classifier head.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.
        strategy: How the ratio r goes with depth: `increasing` (the method), `uniform`,
            `decreasing` and `single_stage` (ablations of about the same overall fraction, fig. 3
            and table 4), or `none`.
        strength: Multiplies all ratios, which are then capped at 1.
        ratios: One ratio for each stage of `bdclean.backbones.stages.ordered_stages`, from input
            to output, instead of `strategy`; `strength` still multiplies.
        gamma: Growth towards the input per group, for `decreasing`.
        single_group: For `single_stage`: which group between stem and head, from 0.
        reinit_seed: Seed of the fresh weights and of the masks.
        labels: `soft` is the method; `hard` the cross-entropy with the teacher's classes (table 5).
        final_temperature: T of the last epoch, or of all epochs if `constant`.
        temperature_schedule: `rising` as above, or `constant`.
        epochs: E.
        lr: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: `cosine` to zero, per epoch, or `constant`.
        batch_size: Per device.
        augmentation: `weak` for CIFAR-10; the authors take `crop` for GTSRB.
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
        strategy: Strategy = "increasing",
        strength: float = 1.0,
        ratios: list[float] | None = None,
        gamma: float = 1.5,
        single_group: int = 0,
        reinit_seed: int = 0,
        labels: LabelKind = "soft",
        final_temperature: float = 4.0,
        temperature_schedule: TemperatureSchedule = "rising",
        epochs: int = 100,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: BCUSchedule = "cosine",
        batch_size: int = 256,
        augmentation: AugmentationName = "weak",
    ) -> None:
        super().__init__(WeightsSource(weights, arch, width, input_size, mean, std, stem))
        self.save_hyperparameters()
        self.strategy: Strategy = check_choice("strategy", strategy, Strategy)
        self.strength, self.ratios = strength, ratios
        self.gamma, self.single_group, self.reinit_seed = gamma, single_group, reinit_seed
        self.labels: LabelKind = check_choice("labels", labels, LabelKind)
        self.final_temperature = check_positive("final_temperature", final_temperature)
        self.temperature_schedule: TemperatureSchedule = check_choice(
            "temperature_schedule", temperature_schedule, TemperatureSchedule
        )
        self.epochs, self.lr = check_positive("epochs", epochs), check_not_negative("lr", lr)
        self.momentum = check_not_negative("momentum", momentum)
        self.weight_decay = check_not_negative("weight_decay", weight_decay)
        self.schedule: BCUSchedule = check_choice("schedule", schedule, BCUSchedule)
        self.batch_size, self.augmentation = check_positive("batch_size", batch_size), augmentation

    @property
    def total_epochs(self) -> int:
        """E."""
        return self.epochs

    def first_view(self) -> View:
        """Unlabelled images; the last batch may be smaller."""
        return View("defense", self.augmentation, batch_size=self.batch_size)

    # ------------------------------------------------------------------ re-initialisation

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """Eq. (3) over the stages of the network; norm layers keep the suspect's values.

        Raises:
            ConfigError: If the suspect has no head, or its family of networks is not known.
        """
        if suspect.head is None:
            raise ConfigError(
                f"model.weights={self.source.weights} has no classifier head, so BCU has no "
                "outputs to distil. Use CBD, which works on features."
            )
        generator = torch.Generator().manual_seed(derive_seed("bcu masks", self.reinit_seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("bcu weights", self.reinit_seed))
            fresh = build(suspect.info)
        stages = zip(
            ordered_stages(suspect),
            ordered_stages(fresh),
            self.stage_ratios(suspect)[0],
            strict=True,
        )
        for student_stage, fresh_stage, ratio in stages:
            for old, new in zip(student_stage.modules, fresh_stage.modules, strict=True):
                mix_weights_(old, new, ratio, generator)
        return suspect

    def stage_ratios(self, model: SplitModel) -> tuple[list[float], float]:
        """Ratio r of each stage, from input to output, and the overall fraction drawn anew.

        Raises:
            ConfigError: If `ratios` does not fit the model, or a setting is out of its range.
        """
        stages = ordered_stages(model)
        sizes = [sum(maskable_count(module) for module in stage.modules) for stage in stages]
        if self.ratios is None:
            chosen = stage_ratios(
                self.strategy,
                [stage.group for stage in stages],
                sizes,
                gamma=self.gamma,
                single_group=self.single_group,
                strength=self.strength,
            )
        else:
            chosen = [min(1.0, self.strength * ratio) for ratio in self.ratios]
            if len(chosen) != len(stages) or min(chosen) < 0:
                names = ", ".join(stage.name for stage in stages)
                raise ConfigError(
                    f"ratios={self.ratios}: {len(stages)} numbers from 0 to 1 are needed, one for "
                    f"each of {names}."
                )
        return chosen, overall_fraction(chosen, sizes)

    # ------------------------------------------------------------------ distillation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of distillation."""
        images = batch["image"]
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        student_logits = self.model(images)
        if self.labels == "hard":
            loss = hard_label_loss(student_logits, teacher_logits)
        else:
            loss = tempered_kl(student_logits, teacher_logits, self.temperature)
        self.log_terms(loss=loss)
        return loss

    @property
    def temperature(self) -> float:
        """T of the present epoch."""
        if self.temperature_schedule == "constant":
            return self.final_temperature
        return rising_temperature(self.current_epoch, self.epochs, self.final_temperature)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD on all of the student; the schedule steps per epoch, as in the authors' code."""
        optimizer = torch.optim.SGD(
            self.model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )
        scheduler = make_schedule(optimizer, self.schedule, self.epochs)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"},
        }

    def protocol(self) -> dict[str, Any]:
        """Adds the ratios and the overall fraction of weights that was drawn anew."""
        facts = super().protocol() | {"method": "bcu", "labels": "none"}
        if self.is_student:
            ratios, fraction = self.stage_ratios(self.model)
            facts |= {"reinit_ratios": ratios, "reinit_fraction": fraction}
        return facts
