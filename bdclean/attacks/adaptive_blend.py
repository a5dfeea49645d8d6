"""Adaptive-Blend (Qi et al., ICLR 2023): parts of a blended picture in training, all of it later.

Training: x' = x + alpha_train * M * (t - x), where M switches a random half of the squares of a
grid off, another half for every image. Test: x' = x + alpha_test * (t - x).
"""

from typing import Any, cast

import torch
from torch import Tensor

from bdclean.attacks import assets
from bdclean.attacks.assets_patches import enlarge
from bdclean.attacks.base import Attack
from bdclean.attacks.blend import BlendTrigger
from bdclean.attacks.checks import (
    is_between,
    require,
    require_integer,
    require_share,
    require_size,
)
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.functional.seeds import derive_seed


class AdaptiveBlend(Attack):
    """The Adaptive-Blend attack. Poisoned rows get the target label, covers keep theirs.

    `seed` draws the squares as well as the rows.

    Args:
        cover_rate: Covers as a share of all rows, in [0, 1].
        grid: Squares per side; 4 gives 16. It must divide height and width of the image.
        mask_rate: Share of the squares that are switched off, in [0, 1); rounded to squares.
        alpha_train: Share of the picture in poisons and covers, in [0, 1].
        alpha_test: Share of the picture at test time, in [0, 1].
        image: "noise", "noise_gauss", "cartoon", or "file:PATH", see `Blend`.
        image_seed: Seed of the two noise pictures.
        target: Target class.
        rate: Share of poisoned rows, in (0, 1].
        **kwargs: See `Attack`; there is no choice of `label_rule`.

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        cover_rate: float = 0.01,
        grid: int = 4,
        mask_rate: float = 0.5,
        alpha_train: float = 0.2,
        alpha_test: float = 0.2,
        image: str = "cartoon",
        image_seed: int = 0,
        target: int | str = 1,
        rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(target=target, rate=rate, label_rule="all_to_one", **kwargs)
        require_share("cover_rate", cover_rate)
        require_integer("grid", grid, 1)
        leaves_one = is_between(mask_rate, 0, 1) and round(mask_rate * grid**2) < grid**2
        require(leaves_one, "mask_rate", mask_rate, "in [0, 1) and leave one square or more")
        require_share("alpha_train", alpha_train)
        require_share("alpha_test", alpha_test)
        assets.require_image("image", image, assets.PICTURES)
        require_integer("image_seed", image_seed, 0)
        self.cover_rate = cover_rate
        self.grid = grid
        self.mask_rate = mask_rate
        self.alpha_train = alpha_train
        self.alpha_test = alpha_test
        self.image = image
        self.image_seed = image_seed

    def make_trigger(self, size: tuple[int, int]) -> BlendTrigger:
        """The whole picture, at the opacity of the test.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: The image cannot be divided into the squares, or the picture file is
                missing or cannot be read.
        """
        height, width = require_size(size)
        divides = height % self.grid == 0 and width % self.grid == 0
        allowed = f"a divisor of both sides of an image of {height}x{width}"
        require(divides, "grid", self.grid, allowed)
        picture, mask = assets.picture(self.image, size, self.image_seed)
        return BlendTrigger(picture, mask, self.alpha_test, self.quantize)

    def pieces(self, count: int) -> Tensor:
        """Which squares `count` images show, (count, grid, grid), 0 or 1, float.

        Every image has round(mask_rate * grid^2) zeros, at places of its own.
        """
        generator = torch.Generator().manual_seed(derive_seed("pieces", self.seed))
        squares = self.grid**2
        rank = torch.rand(count, squares, generator=generator).argsort(1).argsort(1)
        shown = rank >= round(self.mask_rate * squares)
        return shown.float().view(count, self.grid, self.grid)

    def poison_rows(self, images: Tensor, plan: PoisonPlan, trigger: Trigger) -> Tensor:
        """Poisons and covers, each with squares of its own, at the opacity of training."""
        whole = cast("BlendTrigger", trigger)
        pieces = self.pieces(len(images))

        def blend(floats: Tensor, part: slice) -> Tensor:
            shown = enlarge(pieces[part], trigger.size)[:, None]  # (B, 1, H, W)
            share = self.alpha_train * whole.mask * shown
            return (1 - share) * floats + share * whole.picture

        return trigger.change(images, blend)
