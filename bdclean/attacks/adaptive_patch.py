"""Adaptive-Patch (Qi et al., ICLR 2023): one of several patches in training, a set of them later.

Training: x' = x + a_j * m_j * (t_j - x) with one patch j per image. Test: the patches of the test
set are applied one after another, opaque.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bdclean.attacks import assets
from bdclean.attacks.assets_patches import LOGO_QUARTERS, PATCHES, patch
from bdclean.attacks.base import Attack
from bdclean.attacks.checks import Quantize, is_between, require, require_share
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.functional.seeds import derive_seed


class PatchSetTrigger(Trigger):
    """Opaque patches one after another; keeps the patches of training as well.

    Args:
        pictures: t_j of training, (k, 3, H, W), float in [0, 1].
        masks: m_j of training, (k, 1, H, W), float in [0, 1].
        test_pictures: Those of the test, (l, 3, H, W).
        test_masks: Likewise, (l, 1, H, W).
        alphas: Opacities a_j of training, k numbers in [0, 1].
        quantize: How `poison` returns to 8 bits.
    """

    pictures: Tensor
    masks: Tensor
    test_pictures: Tensor
    test_masks: Tensor

    def __init__(
        self,
        pictures: Tensor,
        masks: Tensor,
        test_pictures: Tensor,
        test_masks: Tensor,
        alphas: Sequence[float],
        quantize: Quantize = "round",
    ) -> None:
        tensors = {"pictures": pictures, "masks": masks}
        tensors |= {"test_pictures": test_pictures, "test_masks": test_masks}
        super().__init__(pictures.shape[-2:], quantize, **tensors)
        self.alphas = list(alphas)

    def stamp(self, images: Tensor) -> Tensor:
        """The trigger of the test: x becomes (1 - m) * x + m * t, for one (t, m) after another."""
        for picture, mask in zip(self.test_pictures, self.test_masks, strict=True):
            share = mask.to(images.dtype)
            images = (1 - share) * images + share * picture.to(images.dtype)
        return images

    def stamp_one(self, images: Tensor, which: Tensor) -> Tensor:
        """Training: patch `which`[i] on image i, at its opacity.

        Args:
            images: Float images in [0, 1], (B, 3, H, W).
            which: Numbers of the patches, (B,).
        """
        opacity = torch.tensor(self.alphas)[which][:, None, None, None]
        share = opacity * self.masks[which]
        return (1 - share) * images + share * self.pictures[which]

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that are not buffers, ready for JSON."""
        return {**super().arguments(), "alphas": self.alphas}


class AdaptivePatch(Attack):
    """The Adaptive-Patch attack. Poisoned rows get the target label, covers keep theirs.

    `seed` draws which row gets which patch as well as the rows.

    Args:
        cover_rate: Covers as a share of all rows, in [0, 1].
        patches: The patches of training, each one of `assets_patches.PATCHES` or "file:PATH": an
            image-sized picture of your own, whose alpha channel is the mask.
        alphas: Their opacities, in [0, 1].
        test_patches: The patches of the test, all of them on every image, opaque.
        target: Target class.
        rate: Share of poisoned rows, in (0, 1].
        **kwargs: See `Attack`; there is no choice of `label_rule`.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    def __init__(
        self,
        *,
        cover_rate: float = 0.01,
        patches: Sequence[str] = LOGO_QUARTERS,
        alphas: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        test_patches: Sequence[str] = LOGO_QUARTERS,
        target: int | str = 1,
        rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(target=target, rate=rate, label_rule="all_to_one", **kwargs)
        require_share("cover_rate", cover_rate)
        for key, names in (("patches", patches), ("test_patches", test_patches)):
            require(len(names) > 0, key, list(names), "a list of one patch or more")
            for name in names:
                assets.require_image(key, name, PATCHES)
        fits = len(alphas) == len(patches) and all(is_between(alpha, 0, 1) for alpha in alphas)
        allowed = f"{len(patches)} numbers in [0, 1], one for each of the patches"
        require(fits, "alphas", list(alphas), allowed)
        self.cover_rate = cover_rate
        self.patches = list(patches)
        self.alphas = list(alphas)
        self.test_patches = list(test_patches)

    def make_trigger(self, size: tuple[int, int]) -> PatchSetTrigger:
        """Draws or reads all patches.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: A picture file is missing or cannot be used.
        """
        train = _stack(self.patches, size, "patches")
        test = _stack(self.test_patches, size, "test_patches")
        return PatchSetTrigger(*train, *test, self.alphas, self.quantize)

    def assignment(self, plan: PoisonPlan) -> Tensor:
        """Which patch each row of `plan.touched_index` gets in training, (P,).

        Poisons and covers apart, in an order of their own: the number of rows per patch differs by
        at most one, and no patch is tied to the classes of a sorted data set.
        """
        which = torch.zeros(plan.num_samples, dtype=torch.int64)
        for purpose, rows in (
            ("poison patches", plan.poison_index),
            ("cover patches", plan.cover_index),
        ):
            generator = torch.Generator().manual_seed(derive_seed(purpose, self.seed))
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            which[shuffled] = torch.arange(len(rows)) % len(self.patches)
        return which[plan.touched_index]

    def poison_rows(self, images: Tensor, plan: PoisonPlan, trigger: Trigger) -> Tensor:
        """Poisons and covers, one patch each."""
        patches, which = cast("PatchSetTrigger", trigger), self.assignment(plan)
        return trigger.change(images, lambda floats, part: patches.stamp_one(floats, which[part]))


def _stack(names: Sequence[str], size: tuple[int, int], key: str) -> tuple[Tensor, Tensor]:
    """Pictures (k, 3, H, W) and masks (k, 1, H, W)."""
    pictures, masks = zip(*(patch(name, size, key) for name in names), strict=True)
    return torch.stack(pictures), torch.stack(masks)
