"""Blend (Chen et al., 2017, arXiv:1712.05526): a whole picture mixed in, faintly.

x' = (1 - alpha) * x + alpha * t, with the same alpha at training and at test time.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.attacks import assets
from bdclean.attacks.base import Attack
from bdclean.attacks.checks import (
    LabelRule,
    Quantize,
    RateBase,
    is_between,
    require,
    require_integer,
)
from bdclean.attacks.trigger import Trigger

_FILE = "file:"
_BUILTIN = ("noise", "noise_gauss", "cartoon")


class BlendTrigger(Trigger):
    """Mixes a picture into the image.

    Args:
        picture: t, (3, H, W), float in [0, 1].
        mask: m, (1, H, W), float in [0, 1]; 1 everywhere for a picture without transparency.
        alpha: Share of the picture, in [0, 1].
        quantize: How `poison` returns to 8 bits.
    """

    picture: Tensor
    mask: Tensor

    def __init__(
        self, picture: Tensor, mask: Tensor, alpha: float, quantize: Quantize = "round"
    ) -> None:
        super().__init__(picture.shape[-1], quantize)
        self.alpha = alpha
        self.register_buffer("picture", picture)
        self.register_buffer("mask", mask)

    def stamp(self, images: Tensor) -> Tensor:
        """Returns x' = (1 - a) * x + a * t with a = alpha * m."""
        share = self.alpha * self.mask.to(images.dtype)
        return (1 - share) * images + share * self.picture.to(images.dtype)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that are not buffers, ready for JSON."""
        return {**super().arguments(), "alpha": self.alpha}


class Blend(Attack):
    """The Blend attack.

    Args:
        target: Target class.
        rate: Share of poisoned rows, in (0, 1].
        rate_base: What `rate` is a share of.
        label_rule: What happens to the labels of poisoned rows.
        exclude_target: Leave rows of the target class out of the pool.
        seed: Seed of the selection.
        quantize: How triggered pixels go back to 8 bits.
        alpha: Share of the picture, in [0, 1].
        image: "noise" (uniform), "noise_gauss", "cartoon" (a drawn balloon), or "file:PATH":
            a picture of your own, converted to RGB and resized; its alpha channel is the mask.
        image_seed: Seed of the two noise pictures.

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
        alpha: float = 0.2,
        image: str = "noise",
        image_seed: int = 0,
    ) -> None:
        super().__init__(target, rate, rate_base, label_rule, exclude_target, seed, quantize)
        require(is_between(alpha, 0, 1), "alpha", alpha, "in [0, 1]")
        known = image in _BUILTIN or (image.startswith(_FILE) and image != _FILE)
        require(known, "image", image, f"one of {', '.join(_BUILTIN)}, or file:PATH")
        require_integer("image_seed", image_seed, 0)
        self.alpha = alpha
        self.image = image
        self.image_seed = image_seed

    def make_trigger(self, input_size: int) -> BlendTrigger:
        """Draws or reads the picture at `input_size` pixels.

        Raises:
            AttackError: The picture file is missing or cannot be read.
        """
        require_integer("input_size", input_size, 1)
        mask = torch.ones(1, input_size, input_size)
        if self.image == "noise":
            picture = assets.noise_uniform(input_size, self.image_seed)
        elif self.image == "noise_gauss":
            picture = assets.noise_gauss(input_size, self.image_seed)
        elif self.image == "cartoon":
            picture = assets.cartoon_balloon(input_size)
        else:
            picture, mask = assets.from_file(self.image.removeprefix(_FILE), input_size)
        return BlendTrigger(picture, mask, self.alpha, self.quantize)

    def describe(self) -> dict[str, Any]:
        """The attack's name and settings, ready for JSON; of a file only its name."""
        image = self.image
        if image.startswith(_FILE):
            image = _FILE + Path(image.removeprefix(_FILE)).name
        own = {"alpha": self.alpha, "image": image, "image_seed": self.image_seed}
        return {**super().describe(), **own}
