"""What a view asks for, within what the images allow."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bdclean.data.augmentation import BLURRING, FLIPPING, augment
from bdclean.types import View


class ViewMaker:
    """Augments batches of a view, without flips or blur where these would do harm.

    Args:
        name: Of the data set, for the warnings.
        flip: False where a mirrored image may belong to another class.
        blur: False where blur destroys the trigger that training is meant to see.
    """

    def __init__(self, name: str, *, flip: bool, blur: bool) -> None:
        self._name, self._flip, self._blur = name, flip, blur
        self._told: set[str] = set()

    def tell(self, view: View) -> None:
        """Warns, once of each, of what the augmentation of `view` runs without."""
        wanted = view.augmentation
        if wanted in FLIPPING and not self._flip:
            self._warn(f"{self._name} allows no horizontal flips", wanted)
        if wanted in BLURRING and not self._blur:
            self._warn("Blur destroys the trigger of the attack", wanted)

    def _warn(self, reason: str, wanted: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            rank_zero_warn(f"{reason}: the augmentation {wanted} runs without.")

    def __call__(
        self, view: View, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Makes the views (B, 3, H, W) of float images (B, 3, H, W): one, or as many as asked."""
        return tuple(
            augment(view.augmentation, images, generator, flip=self._flip, blur=self._blur)
            for _ in range(view.views or 1)
        )
