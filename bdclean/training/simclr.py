r"""SimCLR: a backbone without labels (Chen et al., ICML 2020).

Of every image of the `train` role two views v_1, v_2 are drawn; with the backbone f and the
projection head g,

    loss = NT-Xent(g(f(v_1)), g(f(v_2)))                                         (eq. 1)

over the images of all devices. The product is f alone, a model without a head: the projection is
thrown away. Labels are never read. A poisoned backbone is trained by the same module on a data
module with an attack that relabels nothing (`attack/badnets/cbd_ssl` and the like).
"""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from bdclean.backbones.build import start_from
from bdclean.backbones.head import KNNHead, ProbeHead, cache_features
from bdclean.backbones.split import Stem
from bdclean.checks import check_not_negative, check_positive
from bdclean.errors import ConfigError
from bdclean.modules import Needs, Training
from bdclean.modules.base import Classifier, Split
from bdclean.modules.reading import read, share_buffers, steps_per_epoch, viewable_data
from bdclean.modules.trainer import total_steps
from bdclean.modules.training import user_optimizer
from bdclean.types import AugmentationName, Batch, ImageFacts, View


class SimCLR(Training):
    """Contrastive training of a backbone on images alone.

    With `data.splits.val` and `data.validate_in_fit` two monitors look at the features: a linear
    probe (L-BFGS) and nearest neighbours, both on the labelled images of the `probe` role, and
    both measured on the `val` role, never on test images. They steer nothing.

    Args:
        facts: Facts of the data; the classes are those of the monitors alone.
        arch: See `bdclean.backbones.build`. None takes that of `weights`, or resnet18.
        width: Channels of the first stage of our ResNets. None takes that of `weights`, or 64,
            the standard net.
        stem: None takes that of `weights`, or `auto`: the CIFAR stem up to 64 pixels.
        weights: Start from this file instead of a fresh initialisation; a head is dropped.
        hidden_dim: Of the projection head; None takes the number of features.
        output_dim: Of the projection head.
        temperature: tau.
        batch_size: Images per step on all devices together, each in two views. Incomplete batches
            are left out, so that the number of negatives is fixed.
        augmentation: Makes the views.
        optimizer: Any torch optimizer, from YAML; `lightly.utils.lars.LARS` for large batches.
            Biases and batch norms get no weight decay, and so no layer-wise rate.
        warmup_epochs: The rate rises from 0 along a line, then falls along a cosine.
        knn_k: Neighbours of the monitor.
        probe_c: C of the penalty of the monitor's probe.

    Raises:
        ConfigError: If a value is out of its range.
    """

    name = "simclr"
    needs = Needs(images="train")
    classifiers = ("", "probe", "knn")
    can_average = True

    def __init__(
        self,
        facts: ImageFacts,
        arch: str | None = None,
        width: int | None = None,
        stem: Stem | None = None,
        weights: str | None = None,
        hidden_dim: int | None = None,
        output_dim: int = 128,
        temperature: float = 0.5,
        batch_size: int = 512,
        augmentation: AugmentationName = "simclr",
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(
            p, lr=0.12, momentum=0.9, weight_decay=5e-4
        ),
        warmup_epochs: float = 10,
        knn_k: int = 200,
        probe_c: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_arguments("optimizer")
        for name, value in (
            ("temperature", temperature),
            ("output_dim", output_dim),
            ("hidden_dim", 1 if hidden_dim is None else hidden_dim),
            ("knn_k", knn_k),
            ("probe_c", probe_c),
        ):
            check_positive(name, value)
        check_not_negative("warmup_epochs", warmup_epochs)
        if batch_size < 2:
            raise ConfigError(f"batch_size={batch_size}: negatives need at least 2 images.")
        self.install(model=start_from(facts, None, arch, width, stem, weights))
        features = self.model.num_features
        # Here, because a refused command need not wait for it: it brings timm and more.
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        self.projection = SimCLRProjectionHead(features, hidden_dim or features, output_dim)
        self.loss = NTXentLoss(temperature, gather_distributed=True)
        self.view = View("train", augmentation, views=2, batch_size=batch_size, drop_last=True)
        self.optimizer, self.warmup_epochs = optimizer, warmup_epochs
        self.num_classes, self.knn_k, self.probe_c = facts.num_classes, knn_k, probe_c
        self.monitors = nn.ModuleDict()

    def setup(self, stage: str) -> None:
        """Asks the data module for two views of the training images, without labels."""
        super().setup(stage)
        if stage == "fit":
            viewable_data(self.trainer)  # refuses one that cannot serve views

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """NT-Xent of the two views, in float32."""
        projected = self.projection(self.model.features(torch.cat(batch["views"]))).float()
        with torch.autocast(projected.device.type, enabled=False):
            loss: Tensor = self.loss(*projected.chunk(2))
        self.log_terms(loss=loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and warm-up and cosine per step over the whole training."""
        trained = [*self.model.parameters(), *self.projection.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = user_optimizer(self.optimizer, groups)
        steps = total_steps(self.trainer)
        warmup = min(steps, round(self.warmup_epochs * steps_per_epoch(self.trainer, self.view)))
        from lightly.utils.scheduler import CosineWarmupScheduler

        scheduler = CosineWarmupScheduler(optimizer, warmup, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # ------------------------------------------------------------------ monitors

    def begin_evaluation(self, split: Split) -> dict[str, Classifier]:
        """Fits the monitors to the present features of the `probe` role; `val` measures them.

        Raises:
            ConfigError: In a test, since the product has no head.
        """
        if split == "test":
            return super().begin_evaluation(split)
        share_buffers(self.model)  # DDP does so at the first batch; the monitors are fitted before
        view = View("probe", batch_size=self.view.batch_size, labels=True)
        batches = read(self.trainer, view, self.device)  # to measure, not to train
        features, labels = cache_features(self.model.features, batches)
        probe = ProbeHead(features.shape[1], self.num_classes).to(self.device)
        probe.solve_(features, labels, self.probe_c)
        self.monitors["probe"] = probe
        self.monitors["knn"] = KNNHead(features, labels, self.num_classes, self.knn_k)
        return {name: self._monitor(name) for name in ("probe", "knn")}

    def on_validation_epoch_end(self) -> None:
        """Logs `val/probe_acc`, `val/knn_acc`, and the same of `asr` and `pa`."""
        super().on_validation_epoch_end()
        self.monitors.clear()

    def _monitor(self, name: str) -> Classifier:
        return lambda images: self.monitors[name](self.model.features(images))
