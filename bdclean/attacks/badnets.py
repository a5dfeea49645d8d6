"""BadNets (Gu et al., 2017, arXiv:1708.06733): an opaque patch at a fixed place.

x' = (1 - m) * x + m * t, with m in {0, 1}^(1 x H x W) and a pattern t.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.attacks.assets_patches import BW_ANP, enlarge, htba_patch
from bdclean.attacks.base import Attack
from bdclean.attacks.checks import (
    LabelRule,
    Quantize,
    RateBase,
    require,
    require_choice,
    require_integer,
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
        quantize: How `poison` returns to 8 bits; no matter where the pattern is black and white.
    """

    pattern: Tensor
    mask: Tensor

    def __init__(self, pattern: Tensor, mask: Tensor, quantize: Quantize = "round") -> None:
        super().__init__(pattern.shape[-1], quantize)
        self.register_buffer("pattern", pattern)
        self.register_buffer("mask", mask)

    def stamp(self, images: Tensor) -> Tensor:
        """Returns x' = (1 - m) * x + m * t; untouched pixels stay bit-equal."""
        return torch.where(self.mask, self.pattern.to(images.dtype), images)


class BadNets(Attack):
    """The BadNets attack.

    Args:
        target: Target class.
        rate: Share of poisoned rows, in (0, 1].
        rate_base: What `rate` is a share of.
        label_rule: What happens to the labels of poisoned rows.
        exclude_target: Leave rows of the target class out of the pool.
        seed: Seed of the selection.
        quantize: How triggered pixels go back to 8 bits; matters to "htba" only.
        pattern: 3x3 pattern, equal in all channels: "bw_anp" (ANP and BCU code), "checker"
            (BackdoorBench) or "white". Or "htba": random smooth colours (Saha et al., AAAI 2020),
            for larger images.
        position: Corner or centre; the centre of an uneven remainder is rounded up and left.
        patch_size: Side of the patch in pixels, whatever the image size; the 3x3 pattern is
            enlarged by nearest neighbour. At least 3 (1 for "white", 4 for "htba").
        pattern_seed: Seed of the colours of "htba".

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self,
        target: int = 0,
        rate: float = 0.1,
        rate_base: RateBase = "dataset",
        label_rule: LabelRule = "all_to_one",
        exclude_target: bool = False,
        seed: int = 0,
        quantize: Quantize = "round",
        pattern: Pattern = "bw_anp",
        position: Position = "bottom_right",
        patch_size: int = 3,
        pattern_seed: int = 0,
    ) -> None:
        super().__init__(target, rate, rate_base, label_rule, exclude_target, seed, quantize)
        require_choice("pattern", pattern, Pattern)
        require_choice("position", position, Position)
        require_integer("patch_size", patch_size, _SMALLEST[pattern])
        require_integer("pattern_seed", pattern_seed, 0)
        self.pattern = pattern
        self.position = position
        self.patch_size = patch_size
        self.pattern_seed = pattern_seed

    def make_trigger(self, input_size: int) -> PatchTrigger:
        """Places the patch on an image of `input_size` pixels.

        Raises:
            AttackError: The patch is larger than the image.
        """
        require_integer("input_size", input_size, 1)
        size = self.patch_size
        require(size <= input_size, "patch_size", size, f"at most the image size {input_size}")
        if self.pattern == "htba":
            patch = htba_patch(size, self.pattern_seed)
        else:
            patch = enlarge(torch.tensor(_PATTERNS[self.pattern], dtype=torch.float32), size)
        top, left = self._corner(input_size - size)
        rows, columns = slice(top, top + size), slice(left, left + size)
        pattern = torch.zeros(3, input_size, input_size)
        mask = torch.zeros(1, input_size, input_size, dtype=torch.bool)
        pattern[:, rows, columns] = patch
        mask[:, rows, columns] = True
        return PatchTrigger(pattern, mask, self.quantize)

    def describe(self) -> dict[str, Any]:
        """The attack's name and settings, ready for JSON."""
        own = {
            "pattern": self.pattern,
            "position": self.position,
            "patch_size": self.patch_size,
            "pattern_seed": self.pattern_seed,
        }
        return {**super().describe(), **own}

    def _corner(self, free: int) -> tuple[int, int]:
        if self.position == "center":
            return free // 2, free // 2
        vertical, horizontal = self.position.split("_")
        return (0 if vertical == "top" else free), (0 if horizontal == "left" else free)
