"""WaNet (Nguyen and Tran, ICLR 2021, arXiv:2102.10369): a smooth warp that nobody sees.

G = clamp((I + s * F / S) * g, -1, 1), x' = x read at G, bilinearly; F is a small random field,
enlarged, and S = (W, H), so that a move counts in pixels. Noise images are read at
clamp(G + jitter / S, -1, 1) and keep their label, so that the network reacts to this warp only.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from bdclean.attacks.base import Attack
from bdclean.attacks.checks import (
    Quantize,
    is_between,
    require,
    require_choice,
    require_integer,
    require_size,
)
from bdclean.attacks.parts import FurtherTest
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.functional.seeds import derive_seed
from bdclean.types import BatchPlace

Mode = Literal["dynamic", "static"]
_TOLERANCE = 1e-6  # 0.29 * 100 is 28.999999999999996 in floating point


def draw_field(size: tuple[int, int], points: int, generator: torch.Generator) -> Tensor:
    """Draws F: P ~ U(-1, 1) on a grid of control points, over mean(|P|), bicubically enlarged.

    Args:
        size: H and W, in pixels.
        points: k, control points per side; the outer ones lie on the centres of corner pixels.
        generator: On the CPU.

    Returns:
        (1, H, W, 2): (x, y) at row and column; with s = 1, half of it is the shift in pixels.
    """
    control = torch.rand(1, 2, points, points, generator=generator) * 2 - 1
    control = control / control.abs().mean()
    field = functional.interpolate(control, size=size, mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1)


def draw_jitter(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draws the jitter of noise images, U(-1, 1), (count, H, W, 2), on the generator's device."""
    shape = (count, *size, 2)
    return torch.rand(shape, generator=generator, device=generator.device) * 2 - 1


def _identity(size: tuple[int, int]) -> Tensor:
    """I, (1, H, W, 2): the place (x, y) of every pixel, in [-1, 1]."""
    height, width = size
    axes = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
    return torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)[None]


def _over_size(moves: Tensor, size: tuple[int, int]) -> Tensor:
    """Moves (x, y) over S, (..., H, W, 2): x over W and y over H."""
    height, width = size
    return torch.stack([moves[..., 0] / width, moves[..., 1] / height], -1)


def _warp(images: Tensor, grid: Tensor) -> Tensor:
    """Reads images (B, 3, H, W) at a grid (1 or B, H, W, 2), bilinearly, in float32 or better."""
    exact = torch.promote_types(images.dtype, torch.float32)
    grid = grid.to(exact).expand(len(images), -1, -1, -1)
    with torch.autocast(images.device.type, enabled=False):
        warped = functional.grid_sample(images.to(exact), grid, align_corners=True)
    return warped.to(images.dtype)


class WaNetTrigger(Trigger):
    """Reads the image at a fixed grid.

    Args:
        grid: G, (1, H, W, 2), last (x, y), in [-1, 1]; -1 and 1 are the outer pixel centres.
        quantize: How `poison` returns to 8 bits.
    """

    grid: Tensor

    def __init__(self, grid: Tensor, quantize: Quantize = "round") -> None:
        super().__init__(grid.shape[1:3], quantize, grid=grid)

    def stamp(self, images: Tensor) -> Tensor:
        """Returns x read at G."""
        rows = images.reshape(-1, *images.shape[-3:])
        return _warp(rows, self.grid).reshape(images.shape)

    def noise(self, images: Tensor, jitter: Tensor) -> Tensor:
        """Returns x read at clamp(G + jitter / S, -1, 1), in [0, 1].

        Args:
            images: Float images in [0, 1], (B, 3, H, W); not changed in place.
            jitter: In [-1, 1], (B, H, W, 2); 0 gives the trigger.
        """
        grid = (self.grid + _over_size(jitter, self.size)).clamp(-1, 1)
        return _warp(images, grid).clamp(0, 1)


class WaNet(Attack):
    """The WaNet attack.

    `rate_base` must be "dataset", `label_rule` "all_to_one" or "all_to_all". `exclude_target` is
    for the static mode only. `seed` draws the jitter of static covers and of test images as well
    as the rows.

    Args:
        mode: "dynamic": every training batch is poisoned again, at its front. "static": fixed
            poisoned rows and covers, each cover with one jitter of its own.
        strength: s, 0 or above; 0.5 shifts pixels by about 0.3.
        grid_size: k, control points per side of the warp, 2 or more.
        grid_rescale: g, above 0; below 1 zooms in.
        grid_seed: Seed of the warp.
        cross_ratio: p_n, noise images (covers) per poisoned image.
        exact: Dynamic mode: carry fractions from batch to batch, so that `rate` holds over the
            epoch; else int(B * rate) of every batch of B, as the public code.
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    further = ("noise_acc",)

    def __init__(
        self,
        *,
        mode: Mode = "dynamic",
        strength: float = 0.5,
        grid_size: int = 4,
        grid_rescale: float = 1.0,
        grid_seed: int = 0,
        cross_ratio: float = 2.0,
        exact: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(self.rate_base == "dataset", "rate_base", self.rate_base, "dataset")
        fits = self.label_rule != "clean_label"
        require(fits, "label_rule", self.label_rule, "all_to_one or all_to_all")
        require_choice("mode", mode, Mode)
        alone = mode == "static" or not self.exclude_target
        require(alone, "exclude_target", self.exclude_target, "false with mode dynamic")
        require(is_between(strength, 0, math.inf), "strength", strength, "0 or above")
        require_integer("grid_size", grid_size, 2)
        fits = is_between(grid_rescale, 0, math.inf) and grid_rescale > 0
        require(fits, "grid_rescale", grid_rescale, "above 0")
        require_integer("grid_seed", grid_seed, 0)
        most = 1 / self.rate - 1
        fits = is_between(cross_ratio, 0, most + _TOLERANCE)
        require(fits, "cross_ratio", cross_ratio, f"in [0, {most:.4g}] with rate {self.rate}")
        self.mode = mode
        self.strength = strength
        self.grid_size = grid_size
        self.grid_rescale = grid_rescale
        self.grid_seed = grid_seed
        self.cross_ratio = cross_ratio
        self.exact = exact
        self.cover_rate = cross_ratio * self.rate

    @property
    def dynamic(self) -> bool:
        """Whether the attacker controls training and poisons every batch again."""
        return self.mode == "dynamic"

    def make_trigger(self, size: tuple[int, int]) -> WaNetTrigger:
        """Draws the warp and lays it over the image.

        Args:
            size: Height and width of the images in pixels.
        """
        size = require_size(size)
        generator = torch.Generator().manual_seed(derive_seed("wanet", self.grid_seed))
        field = draw_field(size, self.grid_size, generator)
        grid = _identity(size) + _over_size(self.strength * field, size)
        return WaNetTrigger((grid * self.grid_rescale).clamp(-1, 1), self.quantize)

    def poison_rows(self, images: Tensor, plan: PoisonPlan, trigger: Trigger) -> Tensor:
        """Poisoned rows at the trigger grid, covers each at a jittered one."""
        covers = torch.isin(plan.touched_index, plan.cover_index)
        return self._with_noise(images, covers, trigger, "wanet covers")

    def further_tests(
        self, images: Tensor, labels: Tensor, trigger: Trigger
    ) -> dict[str, FurtherTest]:
        """`noise_acc`: all test images at jittered grids, share answered with the true label."""
        everywhere = torch.ones(len(images), dtype=torch.bool)
        shown = self._with_noise(images, everywhere, trigger, "wanet noise test")
        return {"noise_acc": FurtherTest(torch.arange(len(images)), shown, labels)}

    def poison_batch(
        self,
        images: Tensor,
        labels: Tensor,
        trigger: Trigger,
        num_classes: int,
        place: BatchPlace,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The first images of a batch get trigger and label, the next ones noise, the rest nothing.

        See `Attack.poison_batch` and `batch_counts`.
        """
        poison, cover = self.batch_counts(len(images), place)
        own, both = cast(WaNetTrigger, trigger), slice(poison + cover)
        jitter = torch.zeros(poison + cover, *own.grid.shape[1:], device=images.device)
        jitter[poison:] = draw_jitter(cover, own.size, generator)
        images, labels = images.clone(), labels.clone()
        images[both] = own.as_stored(own.noise(images[both], jitter))
        labels[:poison] = self.wanted_label(labels[:poison], num_classes)
        return images, labels

    def batch_counts(self, size: int, place: BatchPlace) -> tuple[int, int]:
        """How many images of a batch a dynamic attack poisons, and how many get noise.

        With `exact`, floor(rate * n) of the first n images of an epoch are poisoned and, of the
        others, the share that makes cross_ratio * rate of all; so a batch always has room.

        Args:
            size: Images of this device's part of the batch.
            place: Of this part.
        """
        whole = size * place.world_size
        if self.exact:
            before, after = self._counts(place.before), self._counts(place.before + whole)
            poison, cover = after[0] - before[0], after[1] - before[1]
        else:
            poison = int(whole * self.rate)
            cover = int(poison * self.cross_ratio)
        return place.share(poison), place.share(poison + cover) - place.share(poison)

    def _counts(self, images: int) -> tuple[int, int]:
        """Poisoned and noise images among the first ones of an epoch."""
        poison = math.floor(self.rate * images + _TOLERANCE)
        of_rest = self.cover_rate / (1 - self.rate) if self.rate < 1 else 0.0
        return poison, math.floor(min(of_rest, 1.0) * (images - poison) + _TOLERANCE)

    def _with_noise(self, images: Tensor, noisy: Tensor, trigger: Trigger, purpose: str) -> Tensor:
        """All images warped, those that are marked in `noisy` with a jitter of their own."""
        own = cast(WaNetTrigger, trigger)
        generator = torch.Generator().manual_seed(derive_seed(purpose, self.seed))

        def transform(floats: Tensor, part: slice) -> Tensor:
            marked = noisy[part]
            jitter = torch.zeros(len(floats), *own.grid.shape[1:])
            jitter[marked] = draw_jitter(int(marked.sum()), own.size, generator)
            return own.noise(floats, jitter)

        return own.change(images, transform)
