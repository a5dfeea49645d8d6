"""What some attacks have beside their trigger."""

from dataclasses import dataclass

from torch import Tensor

from bdclean.functional.pgd import PGD


@dataclass(frozen=True, eq=False)
class FurtherTest:
    """A test set of an attack, in addition to the clean and the triggered one.

    `test/NAME` reports the share of its images that the model answers with `wanted`.

    Attributes:
        rows: Which test images, (M,).
        images: What they become, (M, 3, H, W), uint8.
        wanted: The label that is counted, (M,).
    """

    rows: Tensor
    images: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Adversarial:
    """Adversarial examples that replace training rows before the trigger, made on a surrogate.

    Attributes:
        surrogate: Weights file of the network that is fooled; None if it was not given.
        pgd: Settings of the ascent on the cross-entropy of the true label.
    """

    surrogate: str | None
    pgd: PGD
