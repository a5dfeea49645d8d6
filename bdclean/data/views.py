"""What a view asks for, within what the images allow."""

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bdclean.data.augment import augment, named
from bdclean.errors import ConfigError
from bdclean.types import View

Labels = Literal["hidden", "visible"]
"""Whether the labels of the defence role may be seen."""


def require_classes(num_classes: int) -> None:
    """Checks that there is something to learn from labels.

    Raises:
        ConfigError: If there is a single class.
    """
    if num_classes < 2:
        raise ConfigError(
            "The data has a single class, and a classifier must tell two apart at least; give the "
            "folder above the class folders, or use a method without labels."
        )


def require_shown(defense_root: str | None, labels: Labels) -> None:
    """Checks that the images of the defence role may show their labels.

    Raises:
        ConfigError: If they are hidden, or those of a folder, which have none.
    """
    if defense_root is not None:
        raise ConfigError(
            f"defense_root={defense_root}: images of a folder have no labels, and this method asks "
            "for those of the defence images; use a label-free method, or leave defense_root out "
            "and set defense_labels to visible."
        )
    if labels == "hidden":
        raise ConfigError(
            "defense_labels=hidden: this method asks for labels of the defence images; use a "
            "label-free method, or set defense_labels to visible."
        )


class ViewMaker:
    """Augments batches of a view, without flips or blur where these would do harm.

    Args:
        name: Of the data set, for the warning.
        flip: False where a mirrored image may belong to another class.
        blur: False where blur destroys the trigger that training is meant to see.
    """

    def __init__(self, name: str, *, flip: bool, blur: bool) -> None:
        self._name, self._flip, self._blur = name, flip, blur
        self._warned: set[str] = set()

    def warn_once(self, view: View) -> None:
        """Warns of what the augmentation of `view` runs without; once about flips and blur each."""
        wanted = view.augmentation
        if named(wanted).flips and not self._flip:
            self._warn("flips", wanted, f": images of {self._name} must not be mirrored.")
        if named(wanted).blurs and not self._blur:
            self._warn("blur", wanted, ", which would destroy this attack's trigger.")

    def _warn(self, without: str, wanted: str, reason: str) -> None:
        if without not in self._warned:
            self._warned.add(without)
            rank_zero_warn(f"Augmentation {wanted} runs without {without}{reason}")

    def __call__(
        self, view: View, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Makes the views (B, 3, H, W) of float images (B, 3, H, W): one, or as many as asked."""
        return tuple(
            augment(view.augmentation, images, generator, flip=self._flip, blur=self._blur)
            for _ in range(view.views or 1)
        )
