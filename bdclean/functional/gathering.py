"""What perturbations do to features: along a backdoor, those of all images gather in one point.

It takes the place of flips that pile up in one class where there is no head, and so no class.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

GATHERED: Mapping[str, float] = {
    "ball": 0.4,
    "patch": 0.45,
    "universal 4": 0.33,
    "universal 8": 0.65,
}
"""Share of the way to one point beyond which a probe (`families.PROBES`) is out of line with clean
networks; docs/research/check has what these and attacked networks gave."""

_ALIKE = 0.8  # cosine of two points that count as one


@dataclass(frozen=True, eq=False)
class Gathering:
    """How far the features of perturbed images gather in one point.

    Attributes:
        share: Of the way from where they were (0) to all in one point (1); negative where they
            scatter more than before.
        point: Their mean direction, (D,), of length 1.
    """

    share: float
    point: Tensor

    @property
    def amount(self) -> float:
        """What is compared with `GATHERED`."""
        return self.share

    def agrees(self, other: "Gathering") -> bool:
        """Whether both gather in the same point."""
        return float(cosine_similarity(self.point, other.point, dim=0)) > _ALIKE


def gathering(before: Tensor, after: Tensor) -> Gathering:
    """Compares features of images and of the same images when perturbed.

    It looks at the half of the images that the perturbation moves most, because it does not find
    the way for all of them, and images of the target class have none to go.

    Args:
        before: (N, D), N at least 4.
        after: (N, D).
    """
    moved = cosine_similarity(before.float(), after.float())
    half = moved.argsort()[: max(2, len(moved) // 2)]
    first, last = mean_cosine(before), mean_cosine(after[half])
    share = (last - first) / (1 - first).clamp(min=torch.finfo(first.dtype).eps)
    point = normalize(normalize(after[half].float(), dim=1).mean(0), dim=0)
    return Gathering(share.item(), point)


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine of all pairs, without those of an image and itself.

    Args:
        features: (B, D), B at least 2.

    Returns:
        A scalar, in float32.
    """
    unit, count = normalize(features.float(), dim=1), len(features)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))
