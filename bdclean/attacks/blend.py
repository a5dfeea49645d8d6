"""Blend (Chen et al., 2017, arXiv:1712.05526): a whole picture mixed in, faintly.

x' = (1 - alpha) * x + alpha * t, with the same alpha at training and at test time.
"""

from typing import Any

from torch import Tensor

from bdclean.attacks import assets
from bdclean.attacks.base import Attack
from bdclean.attacks.checks import Quantize, require_integer, require_share, require_size
from bdclean.attacks.trigger import Trigger


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
        super().__init__(picture.shape[-2:], quantize, picture=picture, mask=mask)
        self.alpha = alpha

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
        alpha: Share of the picture, in [0, 1].
        image: "noise" (uniform), "noise_gauss", "cartoon" (a drawn balloon), or "file:PATH":
            a picture of your own, converted to RGB and resized; its alpha channel is the mask.
        image_seed: Seed of the two noise pictures.
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self, *, alpha: float = 0.2, image: str = "noise", image_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        require_share("alpha", alpha)
        assets.require_image("image", image, assets.PICTURES)
        require_integer("image_seed", image_seed, 0)
        self.alpha = alpha
        self.image = image
        self.image_seed = image_seed

    @property
    def survives_blur(self) -> bool:  # type: ignore[override]
        """Noise does not: a sigma of 1 leaves 0.28 of it, one of 2 leaves 0.14."""
        return not self.image.startswith("noise")

    def make_trigger(self, size: tuple[int, int]) -> BlendTrigger:
        """Draws or reads the picture.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: The picture file is missing or cannot be read.
        """
        picture, mask = assets.picture(self.image, require_size(size), self.image_seed)
        return BlendTrigger(picture, mask, self.alpha, self.quantize)
