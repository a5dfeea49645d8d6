"""Purification of a backbone, followed by a linear probe that measures it."""

from abc import ABC
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones import SplitModel
from bdclean.backbones.head import ProbeHead, cache_features
from bdclean.backbones.source import WeightsSource
from bdclean.errors import ConfigError, check_not_negative, check_positive
from bdclean.functional.probe import PROBE_MILESTONES
from bdclean.metrics.fitting import num_rows, scheduled
from bdclean.purification.base import check_choice
from bdclean.purification.staged import Stage, StagedPurifier, StageOptimizer
from bdclean.types import AugmentationName, Batch, View

Probe = Literal["sgd", "lbfgs", "none"]


class ProbedPurifier(StagedPurifier, ABC):
    """Drops the suspect's head; `probe_stages` come last in the plan of a subclass.

    The protocol is that of `bdclean.training.LinearProbe`. The probe is the one place where such
    a method sees labels.

    Args:
        source: The suspect file.
        num_classes: K of the probe.
        probe: `sgd` (the protocol of SSL-Backdoor), `lbfgs` (logistic regression on cached
            features of un-augmented images) or `none` (the product has no head).
        probe_epochs: For `sgd`.
        probe_lr: For `sgd`; times 0.1 after 3/8 and 3/4 of the epochs.
        probe_batch_size: Per device.
        probe_augmentation: For `sgd`.
        probe_c: For `lbfgs`: C of the penalty.
    """

    def __init__(
        self,
        source: WeightsSource,
        num_classes: int,
        probe: Probe,
        probe_epochs: int,
        probe_lr: float,
        probe_batch_size: int,
        probe_augmentation: AugmentationName,
        probe_c: float,
    ) -> None:
        super().__init__(source)
        self.num_classes = num_classes
        self.probe: Probe = check_choice("probe", probe, Probe)
        self.probe_epochs = check_positive("probe_epochs", probe_epochs)
        self.probe_lr = check_not_negative("probe_lr", probe_lr)
        self.probe_batch_size = check_positive("probe_batch_size", probe_batch_size)
        self.probe_c = check_positive("probe_c", probe_c)
        self.probe_augmentation: AugmentationName = probe_augmentation

    def setup(self, stage: str) -> None:
        """Looks at the probe's images before anything is trained.

        Raises:
            ConfigError: If there are none, or there is nothing to validate.
        """
        super().setup(stage)
        if stage != "fit":
            return
        if self.probe != "none":
            num_rows(self.trainer, self.probe_view())
        elif getattr(getattr(self.trainer, "datamodule", None), "validate_in_fit", False):
            raise ConfigError(
                "data.init_args.validate_in_fit: there is no classifier to validate without a "
                "probe; leave it out, or set model.init_args.probe."
            )

    def probe_stages(self) -> tuple[Stage, ...]:
        """The end of the plan."""
        if self.probe == "none":
            return ()
        return (Stage("probe", self.probe_epochs if self.probe == "sgd" else 0),)

    def begin_probe(self) -> None:
        """Statistics of the probe's images, un-augmented, and for `lbfgs` the whole solution."""
        self.model.eval()
        batches = self.scan(self.probe_view())
        features, labels = cache_features(self.model.features, batches)
        if self.probe == "lbfgs":
            self._head.solve_(features, labels, self.probe_c)
        else:
            self._head.measure_(features)

    def probe_view(self) -> View:
        """The few labelled images."""
        name, size = self.probe_augmentation, self.probe_batch_size
        return View("probe", name, batch_size=size, labels=True)

    def probe_step(self, batch: Batch) -> Tensor:
        """Cross-entropy of the head on frozen features."""
        self.model.eval()  # batch norm included
        with torch.no_grad():
            features = self.model.features(batch["image"])
        loss = F.cross_entropy(self._head(features).float(), batch["label"])
        self.log_terms(probe_loss=loss)
        return loss

    def probe_optimizer(self) -> StageOptimizer:
        """SGD on the head, as in SSL-Backdoor's eval_linear.py."""
        head = self._head.parameters()
        optimizer = torch.optim.SGD(head, self.probe_lr, momentum=0.9, weight_decay=1e-4)
        return scheduled(self.trainer, optimizer, "multistep", self.probe_epochs, PROBE_MILESTONES)

    @property
    def untested(self) -> str | None:
        """Before its end a run has no head but one that was drawn, or is half trained."""
        if self.finished or self.probe == "none" or not self.is_student:
            return None
        return (
            "The run was stopped before its linear probe was trained, so there is no classifier "
            "to measure. Go on with `bdclean fit` and --ckpt_path, without what limited the run "
            "(trainer.max_steps, trainer.max_time ...)."
        )

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts nothing as long as the head is the one that was drawn."""
        probed = self.finished or self.plan()[self._stage].name == "probe"
        if probed or self.trainer.state.fn != TrainerFn.FITTING:
            super().validation_step(batch, batch_idx, dataloader_idx)

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """The suspect's backbone; its head, if any, is replaced by that of the probe."""
        suspect.replace_head(None if self.probe == "none" else self.num_classes, "probe")
        return suspect

    def freeze_parts(self) -> None:
        """A head that is solved for gets no gradient."""
        if self.probe == "lbfgs" and isinstance(self.model.head, ProbeHead):
            self.model.head.requires_grad_(False)

    @property
    def _head(self) -> ProbeHead:
        if not isinstance(self.model.head, ProbeHead):
            raise ConfigError("The model has no probe head; set model.init_args.probe.")
        return self.model.head

    def protocol(self) -> dict[str, Any]:
        """The probe sees clean labels; purification sees none."""
        facts = super().protocol() | {"labels": "none"}
        if self.untested is not None:
            facts["head"] = "untrained"
        elif isinstance(self.model.head, ProbeHead):
            facts |= {"head": "probe", "probe": self.probe, "probe_labels": "clean"}
        return facts
