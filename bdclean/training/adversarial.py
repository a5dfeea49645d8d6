"""Adversarial training (PGD-AT; Madry et al., ICLR 2018, arXiv:1706.06083).

Every step trains on the worst images that PGD finds around those of the batch (eq. 2.1 there):

    min over w of  E [ max over |delta| <= epsilon of  CE(f_w(x + delta), y) ]

Such a network is the surrogate on which the label-consistent attack makes its images.
"""

from typing import Any, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.attacker import Attacker, BatchNormMode, attack_precision
from bdclean.backbones.split import Stem
from bdclean.errors import ConfigError
from bdclean.functional.perturbation import PGD, pgd
from bdclean.functional.schedules import Schedule
from bdclean.training.supervised import Supervised
from bdclean.types import AugmentationName, Batch


class AdversarialTraining(Supervised):
    """Supervised training on adversarial versions of the augmented images.

    The ball is in pixel space, L-infinity, with a random start. Clean images are not trained on.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Per channel; comes from the data module.
        std: Per channel; comes from the data module.
        epsilon: Radius of the ball in 8-bit pixel values.
        pgd_steps: Gradient steps of the attack.
        step_size: Length of a step, in 8-bit pixel values.
        attack_bn: Batch norm while the images are sought: `eval`, with running statistics, or
            `train`, with those of the batch. The training step itself uses the batch's.
        arch: See `bdclean.backbones.build`. None takes that of `weights`, or resnet18.
        width: Channels of the first stage of our ResNets. None takes that of `weights`, or 64,
            the standard net.
        stem: None takes that of `weights`, or `auto`: the CIFAR stem up to 64 pixels.
        weights: Start from this file instead of a fresh initialisation.
        batch_size: Images per step and device.
        augmentation: Applied on the device, before the attack.
        optimizer: Any torch optimizer, from YAML.
        schedule: Learning-rate schedule over the whole training.
        milestones: For `multistep`, as fractions of the training.
        gamma: For `multistep`.
        label_smoothing: Of the cross-entropy that is trained on.

    Raises:
        ConfigError: A setting of the attack is out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        epsilon: float = 8.0,
        pgd_steps: int = 10,
        step_size: float = 2.0,
        attack_bn: BatchNormMode = "eval",
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
        super().__init__(
            num_classes,
            input_size,
            mean,
            std,
            arch,
            width,
            stem,
            weights,
            batch_size,
            augmentation,
            optimizer,
            schedule,
            milestones,
            gamma,
            label_smoothing,
        )
        self.pgd = PGD(epsilon, pgd_steps, step_size, "pixel255", "linf", random_start=True)
        if attack_bn not in get_args(BatchNormMode):
            raise ConfigError(f"attack_bn={attack_bn!r}: it must be one of eval, train.")
        self.attack_bn = attack_bn
        self._attacker: Attacker | None = None

    def on_train_start(self) -> None:
        """Forgets the copy of an earlier fit, which may lie on another device."""
        super().on_train_start()
        self._attacker = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the adversarial images, in float32."""
        if "label" in batch:  # its absence is refused below
            adversarial = self.attack(batch["image"], batch["label"])
            batch = {**batch, "image": adversarial}
        return super().training_step(batch, batch_idx)

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial versions of `images` (B, 3, H, W) in [0, 1], detached."""
        with attack_precision(images.device.type) as dtype:
            if self._attacker is None:
                self._attacker = Attacker(self.model, self.attack_bn, dtype)
            attacker, head = self._attacker, self.model.head
            assert head is not None  # noqa: S101  (every classifier that is trained has one)
            attacker.refresh_(self.model)

            def loss(x: Tensor) -> Tensor:
                logits = head(attacker.features(x)).float()
                return F.cross_entropy(logits, labels, reduction="sum")

            return pgd(images, loss, self.pgd)

    def protocol(self) -> dict[str, Any]:
        """As a supervised run, and the ball."""
        ball = {
            "epsilon": self.pgd.epsilon,
            "pgd_steps": self.pgd.steps,
            "step_size": self.pgd.step_size,
        }
        return super().protocol() | {"method": "adversarial_training", **ball}
