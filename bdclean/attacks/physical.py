"""PhysicalBA (Li et al., 2021, arXiv:2104.02361): a patch that survives being moved and resized.

x' = (1 - m) * x + m * t as in BadNets; in training the images are then flipped, brightened,
rotated, shifted and shrunk at random, so that the trigger need not keep its place and size.
"""

from typing import Any, Literal

from bdclean.attacks import assets, assets_patches
from bdclean.attacks.base import Attack
from bdclean.attacks.blend import BlendTrigger
from bdclean.attacks.checks import require_choice

ApplyTo = Literal["all", "poison"]


class PhysicalBA(Attack):
    """The PhysicalBA attack.

    Args:
        image: The patch, one of `assets_patches.PATCHES`, or "file:PATH": an image-sized picture
            of your own, whose alpha channel is the mask.
        apply_to: Which training images the physical transformations reach. "all": they are the
            training's augmentation (`augmentation: physical` of the training module), not the
            attack's. "poison": the attack transforms the poisoned rows alone, in another way in
            every batch, before the training's augmentation.
        rate: Share of poisoned rows, in (0, 1].
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        image: str = "logo",
        apply_to: ApplyTo = "all",
        rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(rate=rate, **kwargs)
        assets.require_image("image", image, assets_patches.PATCHES)
        require_choice("apply_to", apply_to, ApplyTo)
        self.image = image
        self.apply_to = apply_to
        self.poison_augmentation = "physical" if apply_to == "poison" else "none"

    def make_trigger(self, size: tuple[int, int]) -> BlendTrigger:
        """The opaque patch; it is not transformed at test time.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: The picture file is missing or cannot be used.
        """
        picture, mask = assets_patches.patch(self.image, size)
        return BlendTrigger(picture, mask, 1.0, self.quantize)
