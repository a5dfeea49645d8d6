"""PhysicalBA (Li et al., 2021, arXiv:2104.02361): a patch that survives being moved and resized.

x' = (1 - m) * x + m * t as in BadNets; in training the images are then flipped, brightened,
rotated, shifted and shrunk at random, so that the trigger need not keep its place and size.
"""

from typing import Any, Literal

from bdclean.attacks import assets, assets_patches
from bdclean.attacks.base import Attack
from bdclean.attacks.blend import BlendTrigger
from bdclean.attacks.checks import LabelRule, Quantize, RateBase, require_choice

ApplyTo = Literal["all", "poison"]


class PhysicalBA(Attack):
    """The PhysicalBA attack.

    Args:
        target: Target class.
        rate: Share of poisoned rows, in (0, 1].
        rate_base: What `rate` is a share of.
        label_rule: What happens to the labels of poisoned rows.
        exclude_target: Leave rows of the target class out of the pool.
        seed: Seed of the selection.
        quantize: How triggered pixels go back to 8 bits.
        image: The patch, one of `assets_patches.PATCHES`, or "file:PATH": an image-sized picture
            of your own, whose alpha channel is the mask.
        apply_to: Which training images the physical transformations reach. "all": they are the
            training's augmentation (`augmentation: physical` of the training module), not the
            attack's. "poison": the attack transforms the poisoned rows alone, anew in every
            batch, before the training's augmentation.

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self,
        target: int = 0,
        rate: float = 0.05,
        rate_base: RateBase = "dataset",
        label_rule: LabelRule = "all_to_one",
        exclude_target: bool = False,
        seed: int = 0,
        quantize: Quantize = "round",
        image: str = "logo",
        apply_to: ApplyTo = "all",
    ) -> None:
        super().__init__(target, rate, rate_base, label_rule, exclude_target, seed, quantize)
        assets.require_image("image", image, assets_patches.PATCHES)
        require_choice("apply_to", apply_to, ApplyTo)
        self.image = image
        self.apply_to = apply_to
        self.poison_augmentation = "physical" if apply_to == "poison" else "none"

    def make_trigger(self, input_size: int) -> BlendTrigger:
        """The opaque patch; it is not transformed at test time.

        Raises:
            AttackError: The picture file is missing or cannot be used.
        """
        picture, mask = assets_patches.patch(self.image, input_size)
        return BlendTrigger(picture, mask, 1.0, self.quantize)

    def describe(self) -> dict[str, Any]:
        """The attack's name and settings, ready for JSON; of a file only its name."""
        own = {"image": assets.recorded(self.image), "apply_to": self.apply_to}
        return {**super().describe(), **own}
