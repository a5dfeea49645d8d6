"""The linear probe: a classifier on the frozen features of any backbone.

The protocol is that of SSL-Backdoor (Saha et al., CVPR 2022; github.com/UMBCvision/SSL-Backdoor,
`moco/eval_linear.py`), with the last epoch instead of the best one on validation data. See
`bdclean.functional.probe` and docs/methods/linear_probe.md.
"""

import warnings
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, SplitModel, build
from bdclean.backbones.head import ProbeHead, cache_features
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.errors import ConfigError, check_not_negative, check_positive
from bdclean.functional.probe import PROBE_MILESTONES
from bdclean.metrics.evaluation import BackdoorModule
from bdclean.metrics.fitting import FixedLength, own_epochs, scan, scheduled, viewable_data
from bdclean.types import AugmentationName, Batch, View

_RECORD = "bdclean_probe"  # our entry in a checkpoint


class LinearProbe(FixedLength, BackdoorModule):
    """Puts a new head on the backbone of a weights file, and trains the head alone.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Normalisation of foreign files; comes from the data module.
        std: As `mean`.
        weights: The file; a head in it is replaced.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.
        probe: `sgd`, the protocol, or `lbfgs`: logistic regression on the cached features of
            un-augmented images, deterministic, solved before an only epoch at learning rate 0.
        epochs: For `sgd`.
        lr: For `sgd`; times 0.1 after 3/8 and 3/4 of the epochs.
        momentum: For `sgd`.
        weight_decay: For `sgd`.
        batch_size: Per device.
        augmentation: For `sgd`.
        probe_c: For `lbfgs`: C of the penalty.
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
        probe: Literal["sgd", "lbfgs"] = "sgd",
        epochs: int = 40,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        batch_size: int = 256,
        augmentation: AugmentationName = "weak",
        probe_c: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if probe not in ("sgd", "lbfgs"):
            raise ConfigError(f"probe={probe!r}: it must be one of sgd, lbfgs.")
        for key, number in ("epochs", epochs), ("batch_size", batch_size), ("probe_c", probe_c):
            check_positive(key, number)
        for key, number in ("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay):
            check_not_negative(key, number)
        self.source = WeightsSource(weights, arch, width, input_size, mean, std, stem)
        self.num_classes, self.solves = num_classes, probe == "lbfgs"
        self.epochs = 1 if self.solves else epochs
        self.lr = 0.0 if self.solves else lr
        self.momentum, self.weight_decay, self.probe_c = momentum, weight_decay, probe_c
        augmentation = "none" if self.solves else augmentation
        self.view = View("probe", augmentation, batch_size=batch_size, labels=True)

    def setup(self, stage: str) -> None:
        """Reads the file here, so that a restored checkpoint wins over it."""
        super().setup(stage)
        if stage == "fit":
            own_epochs(self.trainer, self.epochs)
            # The backbone is in evaluation mode on purpose; Lightning warns about such modules.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
            model = self.source.load()
            model.replace_head(self.num_classes, "probe")
            self._install(model)
        elif self._modules["model"] is None and self.source.is_there:
            self._install(self.source.load())

    def _install(self, model: SplitModel) -> None:
        model.to(memory_format=torch.channels_last)
        self.model = model.requires_grad_(False).eval()
        if isinstance(model.head, ProbeHead):
            model.head.requires_grad_(True)

    @property
    def head(self) -> ProbeHead:
        """The head that is trained."""
        if not isinstance(self.model.head, ProbeHead):
            raise ConfigError("The model has no probe head yet; fit it first.")
        return self.model.head

    def on_fit_start(self) -> None:
        """Asks for the few labelled images."""
        viewable_data(self.trainer).set_view(self.view)

    def on_train_start(self) -> None:
        """Measures the features of the un-augmented images; `lbfgs` solves for the head."""
        super().on_train_start()
        if self.trainer.global_step:
            return  # restored
        batches = scan(self.trainer, self.view, self.device)
        features, labels = cache_features(self.model.features, batches)
        if self.solves:
            self.head.solve_(features, labels, self.probe_c)
        else:
            self.head.measure_(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the head on frozen features."""
        with torch.no_grad():
            features = self.model.features(batch["image"])
        loss = F.cross_entropy(self.head(features).float(), batch["label"])
        self.log(
            "train/loss",
            loss.detach(),
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            sync_dist=True,
        )
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD on the head."""
        viewable_data(self.trainer).set_view(self.view)  # its length is what a schedule needs
        optimizer = torch.optim.SGD(
            self.head.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
        )
        return scheduled(self.trainer, optimizer, "multistep", self.epochs, PROBE_MILESTONES)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the description of the network."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_RECORD] = self.model.info.to_metadata()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the network whose weights are restored next.

        Raises:
            ConfigError: If the checkpoint is not one of a linear probe.
        """
        super().on_load_checkpoint(checkpoint)
        if _RECORD not in checkpoint:
            raise ConfigError(
                "ckpt_path: this checkpoint was not written by a linear probe. A backbone to be "
                "probed comes in through model.weights."
            )
        self._install(build(ModelInfo.from_metadata(checkpoint[_RECORD])))

    def protocol(self) -> dict[str, Any]:
        """The head is a probe that has seen clean labels."""
        facts = super().protocol() | {"method": "linear_probe"}
        if isinstance(self.model.head, ProbeHead):
            kind = "lbfgs" if self.solves else "sgd"
            facts |= {"head": "probe", "probe": kind, "labels": "clean"}
        return facts
