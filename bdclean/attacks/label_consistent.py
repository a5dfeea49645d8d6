"""Label-consistent attack (Turner et al., 2019, arXiv:1912.02771): CLA, LC.

Images of the target class are perturbed until their own class is hard to see, and a patch is put
on top; no label changes. With a surrogate g, y the target class, a the step:

    x_0 = x,  x_(i+1) = clip_[0,1](x + clip_eps(x_i + a sign(grad CE(g(x_i), y)) - x))
    x' = (1 - m) * x_adv + m * t

Test images get the patch alone. The perturbation needs a network, which attacks know nothing
about: this file names it (`adversarial`), and the data module computes it.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.attacks.badnets import BadNets, PatchTrigger, Pattern, Position
from bdclean.attacks.base import Attack
from bdclean.attacks.checks import (
    LabelRule,
    RateBase,
    is_between,
    require,
    require_choice,
    require_integer,
    require_size,
)
from bdclean.attacks.parts import Adversarial
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.functional.pgd import PGD, StepUnit

Patch = Literal["single", "corners4", "corners4_same"]


class LabelConsistent(Attack):
    """The label-consistent attack.

    `quantize` matters for an amplitude below 1; the adversarial examples are rounded in any case.
    `exclude_target` must be false.

    Args:
        surrogate: Weights file (`model.safetensors` of a run) of the network that is fooled.
            Needed once training rows are made; not for evaluation, nor with an epsilon of 0.
        epsilon: Radius of the L-infinity ball in 8-bit pixel values: 0 (then it is BadNets on
            the target class), or from 1 to 255.
        pgd_steps: Gradient steps, at least 1; there is no random start.
        step_size: Length of a step, above 0.
        step_unit: Its unit, see `bdclean.functional.pgd.PGD`.
        patch: "single"; "corners4": all corners, the left ones mirrored, so that a flipped
            trigger is the same one; "corners4_same": four identical copies (BCU).
        pattern: See `BadNets`; that of the right-hand corners.
        position: Of a single patch; does not matter with four corners.
        patch_size: See `BadNets`.
        amplitude: A in (0, 1], of training images: below 1, white pixels of the patch become
            x_adv + A and black ones x_adv - A, clipped (Turner et al.). Test images get 1.
        rate: Share of poisoned rows, in (0, 1].
        rate_base: What `rate` is a share of.
        label_rule: "clean_label" is the only one.
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    def __init__(
        self,
        *,
        surrogate: str | None = None,
        epsilon: float = 16.0,
        pgd_steps: int = 7,
        step_size: float = 4.0,
        step_unit: StepUnit = "pixel255",
        patch: Patch = "single",
        pattern: Pattern = "bw_anp",
        position: Position = "top_left",
        patch_size: int = 3,
        amplitude: float = 1.0,
        rate: float = 0.6,
        rate_base: RateBase = "target_class",
        label_rule: LabelRule = "clean_label",
        **kwargs: Any,
    ) -> None:
        super().__init__(rate=rate, rate_base=rate_base, label_rule=label_rule, **kwargs)
        require(label_rule == "clean_label", "label_rule", label_rule, "clean_label")
        fits = epsilon == 0 or is_between(epsilon, 1, 255)
        require(fits, "epsilon", epsilon, "0 or in [1, 255], in 8-bit pixel values")
        require_integer("pgd_steps", pgd_steps, 1)
        long = math.isfinite(step_size) and step_size > 0
        require(long, "step_size", step_size, "above 0")
        require_choice("step_unit", step_unit, StepUnit)
        require_choice("patch", patch, Patch)
        fits = is_between(amplitude, 0, 1) and amplitude > 0
        require(fits, "amplitude", amplitude, "in (0, 1]")
        self.surrogate = surrogate
        self.epsilon, self.pgd_steps = epsilon, pgd_steps
        self.step_size, self.step_unit = step_size, step_unit
        self.pgd = PGD(epsilon, pgd_steps, step_size, step_unit, "linf", random_start=False)
        self.patch: Patch = patch
        self.pattern, self.position, self.patch_size = pattern, position, patch_size
        self.amplitude = amplitude
        self._patch_at(position)  # checks these three

    @property
    def adversarial(self) -> Adversarial | None:
        """Which adversarial examples get the patch; None with an epsilon of 0."""
        return Adversarial(self.surrogate, self.pgd) if self.epsilon else None

    def make_trigger(self, size: tuple[int, int]) -> PatchTrigger:
        """The patch, or the four of them.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: The patches do not fit into the image.
        """
        if self.patch == "single":
            return self._patch_at(self.position).make_trigger(size)
        height, width = require_size(size)
        half = min(height, width) // 2
        allowed = f"at most {half} for four corners, half the side of an image of {height}x{width}"
        require(self.patch_size <= half, "patch_size", self.patch_size, allowed)
        pattern = torch.zeros(3, height, width)
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        corners: tuple[Position, ...] = ("top_right", "bottom_right")
        if self.patch == "corners4_same":
            corners += ("top_left", "bottom_left")
        for corner in corners:
            part = self._patch_at(corner).make_trigger(size)
            pattern, mask = pattern + part.pattern, mask | part.mask
        if self.patch == "corners4":
            pattern, mask = pattern + pattern.flip(-1), mask | mask.flip(-1)
        return PatchTrigger(pattern, mask, self.quantize)

    def poison_rows(self, images: Tensor, plan: PoisonPlan, trigger: Trigger) -> Tensor:
        """Puts the patch on adversarial examples, faint if the amplitude is below 1."""
        stamped = trigger.poison(images)
        if self.amplitude == 1:
            return stamped
        assert isinstance(trigger, PatchTrigger)  # noqa: S101  (the attack's own)
        mask, shift = trigger.mask, self.amplitude * (2 * trigger.pattern - 1)
        return trigger.change(images, lambda x, _: torch.where(mask, (x + shift).clamp(0, 1), x))

    def describe(self) -> dict[str, Any]:
        """The attack's name and settings, ready for JSON; the surrogate is no part of them."""
        settings = super().describe()
        del settings["surrogate"]
        return settings | ({} if self.patch == "single" else {"position": None})

    def _patch_at(self, position: Position) -> BadNets:
        return BadNets(
            quantize=self.quantize,
            pattern=self.pattern,
            position=position,
            patch_size=self.patch_size,
        )
