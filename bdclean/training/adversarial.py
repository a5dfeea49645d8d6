"""Adversarial training (PGD-AT; Madry et al., ICLR 2018, arXiv:1706.06083).

Every step trains on the worst images that PGD finds around those of the batch (eq. 2.1 there):

    min over w of  E [ max over |delta| <= epsilon of  CE(f_w(x + delta), y) ]

Such a network is the surrogate on which the label-consistent attack makes its images.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.perturber import BatchNormMode, Perturber, perturb_precision
from bdclean.checks import check_choice
from bdclean.functional.pgd import PGD, pgd
from bdclean.training.supervised import Supervised
from bdclean.types import Batch, ImageFacts


class AdversarialTraining(Supervised):
    """Supervised training on adversarial versions of the augmented images.

    The ball is in pixel space. Clean images are not trained on.

    Args:
        facts: Facts of the data.
        pgd: The ball and the steps in it; by default of two 8-bit pixel values.
        perturb_bn: Batch norm while the images are sought: `eval`, with running statistics, or
            `train`, with those of the batch. The training step itself uses the batch's.
        **kwargs: Those of `Supervised`.

    Raises:
        ConfigError: A setting is out of its range.
    """

    name = "adversarial_training"

    def __init__(
        self,
        facts: ImageFacts,
        pgd: PGD = PGD(8.0, 10, 2.0, "pixel255"),  # noqa: B008  (frozen)
        perturb_bn: BatchNormMode = "eval",
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, **kwargs)
        self.pgd = pgd
        self.perturb_bn: BatchNormMode = check_choice("perturb_bn", perturb_bn, BatchNormMode)
        self._perturber: Perturber | None = None

    def on_train_start(self) -> None:
        """Forgets the copy of an earlier fit, which may lie on another device."""
        super().on_train_start()
        self._perturber = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the adversarial images, in float32."""
        if "label" in batch:  # its absence is refused below
            batch = {**batch, "image": self.perturb(batch["image"], batch["label"])}
        return super().training_step(batch, batch_idx)

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial versions of `images` (B, 3, H, W) in [0, 1], detached."""
        with perturb_precision(images.device.type) as dtype:
            if self._perturber is None:
                self._perturber = Perturber(self.model, self.perturb_bn, dtype)
            copy, head = self._perturber, self.model.require_head()
            copy.refresh_(self.model)

            def loss(x: Tensor) -> Tensor:
                logits = head(copy.features(x)).float()
                return F.cross_entropy(logits, labels, reduction="sum")

            return pgd(images, loss, self.pgd)

    def details(self) -> dict[str, Any]:
        """Adds the ball."""
        ball = {
            "epsilon": self.pgd.epsilon,
            "pgd_steps": self.pgd.steps,
            "step_size": self.pgd.step_size,
        }
        return super().details() | ball
