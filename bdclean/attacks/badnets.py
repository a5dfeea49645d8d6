"""BadNets (Gu et al., 2017, arXiv:1708.06733): an opaque patch at a fixed place.

x' = (1 - m) * x + m * t, with m in {0, 1}^(1 x H x W) and a pattern t.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.attacks.assets_patches import BW_ANP, enlarge, htba_patch
from bdclean.attacks.base import Attack
from bdclean.attacks.checks import (
    Quantize,
    require,
    require_choice,
    require_integer,
    require_size,
)
from bdclean.attacks.trigger import Trigger

Pattern = Literal["bw_anp", "checker", "white", "htba"]
Position = Literal["top_left", "top_right", "bottom_left", "bottom_right", "center"]

# Rows from top to bottom; 1 is white, 0 is black (a black pixel is part of the trigger too).
_PATTERNS: dict[Pattern, tuple[tuple[int, ...], ...]] = {
    "bw_anp": BW_ANP,
    "checker": ((1, 0, 1), (0, 1, 0), (1, 0, 1)),
    "white": ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
}
_SMALLEST: dict[Pattern, int] = {"bw_anp": 3, "checker": 3, "white": 1, "htba": 4}


class PatchTrigger(Trigger):
    """Overwrites the pixels under a mask.

    Args:
        pattern: (3, H, W), float in [0, 1]; read under the mask only.
        mask: (1, H, W), bool.
        quantize: How `poison` returns to 8 bits; does not matter for a black and white pattern.
    """

    pattern: Tensor
    mask: Tensor

    def __init__(self, pattern: Tensor, mask: Tensor, quantize: Quantize = "round") -> None:
        super().__init__(pattern.shape[-2:], quantize, pattern=pattern, mask=mask)

    def stamp(self, images: Tensor) -> Tensor:
        """Returns x' = (1 - m) * x + m * t; untouched pixels stay bit-equal."""
        return torch.where(self.mask, self.pattern.to(images.dtype), images)


class BadNets(Attack):
    """The BadNets attack.

    Args:
        pattern: 3x3 pattern, equal in all channels: "bw_anp" (ANP and BCU code), "checker"
            (BackdoorBench) or "white". Or "htba": random smooth colours (Saha et al., AAAI 2020),
            for larger images.
        position: Corner or centre; the centre of an uneven remainder is rounded up and left.
        patch_size: Side of the patch in pixels, whatever the image size; the 3x3 pattern is
            enlarged by nearest neighbour. At least 3 (1 for "white", 4 for "htba").
        pattern_seed: Seed of the colours of "htba".
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        pattern: Pattern = "bw_anp",
        position: Position = "bottom_right",
        patch_size: int = 3,
        pattern_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_choice("pattern", pattern, Pattern)
        require_choice("position", position, Position)
        require_integer("patch_size", patch_size, _SMALLEST[pattern])
        require_integer("pattern_seed", pattern_seed, 0)
        self.pattern = pattern
        self.position = position
        self.patch_size = patch_size
        self.pattern_seed = pattern_seed

    def make_trigger(self, size: tuple[int, int]) -> PatchTrigger:
        """Places the patch on an image.

        Args:
            size: Height and width of the image in pixels.

        Raises:
            AttackError: The patch is larger than the image.
        """
        height, width = require_size(size)
        side = self.patch_size
        fits = side <= min(height, width)
        require(fits, "patch_size", side, f"at most the side of an image of {height}x{width}")
        if self.pattern == "htba":
            patch = htba_patch(side, self.pattern_seed)
        else:
            patch = enlarge(torch.tensor(_PATTERNS[self.pattern]).float(), (side, side))
        top, left = self._corner(height - side, width - side)
        rows, columns = slice(top, top + side), slice(left, left + side)
        pattern = torch.zeros(3, height, width)
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        pattern[:, rows, columns] = patch
        mask[:, rows, columns] = True
        return PatchTrigger(pattern, mask, self.quantize)

    def _corner(self, free_rows: int, free_columns: int) -> tuple[int, int]:
        """Top row and left column of the patch, from the pixels that it leaves free."""
        if self.position == "center":
            return free_rows // 2, free_columns // 2
        vertical, horizontal = self.position.split("_")
        top = 0 if vertical == "top" else free_rows
        return top, (0 if horizontal == "left" else free_columns)
