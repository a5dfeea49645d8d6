"""How much a prediction changes under an adversarial patch (AdvrBD, algorithm 1).

The authors' formulas are lost; docs/methods/advrbd.md tells what is reconstructed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.checks import check_choice, check_not_negative, check_positive
from bdclean.errors import ConfigError
from bdclean.functional.pgd import PGD, pgd

PatchShape = Literal["square", "disc"]
Inner = Literal["kl", "ce"]
Places = Literal["random", "grid"]


def patch_mask(centres: Tensor, radius: int, size: int, shape: PatchShape = "square") -> Tensor:
    """Which pixels may be changed: one patch for each image, cut off at the border.

    Args:
        centres: Row and column of each patch, (B, 2), integers in [0, size).
        radius: r; a square covers 2 r + 1 rows and columns.
        size: Side of the images.
        shape: `square` (largest of both distances at most r) or `disc` (Euclidean distance).

    Returns:
        (B, 1, size, size), bool.
    """
    line = torch.arange(size, device=centres.device)
    rows = (line - centres[:, :1]).abs()[:, :, None]  # (B, size, 1)
    columns = (line - centres[:, 1:]).abs()[:, None, :]  # (B, 1, size)
    if shape == "square":
        inside = torch.maximum(rows, columns) <= radius
    else:
        inside = rows**2 + columns**2 <= radius**2
    return inside[:, None]


def prediction_change(before: Tensor, after: Tensor) -> Tensor:
    """D_KL(P || Q) of each sample, for P and Q the softmax of logits (B, K); (B,), in nats."""
    p, q = before.float().log_softmax(1), after.float().log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def adversarial_patch(
    images: Tensor,
    clean: Tensor,
    mask: Tensor,
    predict: Callable[[Tensor], Tensor],
    config: PGD,
    inner: Inner = "kl",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images whose pixels under the mask were moved so that the prediction changes most.

    The gradient of the KL divergence is exactly zero at the image itself, so with `kl` the
    ascent needs the random start of `config`.

    Args:
        images: x, (B, 3, H, W), in [0, 1].
        clean: Logits at x, (B, K).
        mask: m, (B, 1, H, W), bool.
        predict: Maps images to logits (B, K).
        config: Ball and steps.
        inner: What is maximised: `kl` the divergence from the prediction at x, `ce` the
            cross-entropy of the class predicted at x.
        generator: Of the random start, on the device of the images.

    Returns:
        clip(x + m * delta), (B, 3, H, W), detached.
    """

    def loss(moved: Tensor) -> Tensor:
        logits = predict(torch.where(mask, moved, images))
        if inner == "kl":
            return prediction_change(clean, logits).sum()
        return F.cross_entropy(logits.float(), clean.argmax(1), reduction="sum")

    return torch.where(mask, pgd(images, loss, config, generator), images)


def grid_centres(count: int, size: int) -> Tensor:
    """Centres of `count` patches, a square number, that share an image out evenly: (count, 2)."""
    side = math.isqrt(count)
    line = [(2 * place + 1) * size // (2 * side) for place in range(side)]
    return torch.cartesian_prod(torch.tensor(line), torch.tensor(line))


@dataclass(frozen=True)
class PatchScore:
    """s_i: how far the prediction for an image moves under adversarial patches.

    Of several patches the least effect counts. A patch may hit the trigger, and then the
    prediction for a poisoned image moves far, too; that all of them hit it is unlikely.

    Attributes:
        shape: Of the patches: `square` or `disc`.
        radius: r in pixels; None takes an eighth of the side of the images.
        pgd: Ball and steps.
        inner: What is maximised; see `adversarial_patch`.
        num_masks: Patches tried for each image; the score is the least of them.
        places: Of the centres: `random`, anew for each image, or a `grid` that all images share;
            `num_masks` must be a square number then.

    Raises:
        ConfigError: If a value is out of its range.
    """

    shape: PatchShape = "square"
    radius: int | None = None
    pgd: PGD = PGD(8.0, 10, 0.25)  # noqa: RUF009  (frozen)
    inner: Inner = "kl"
    num_masks: int = 3
    places: Places = "random"

    def __post_init__(self) -> None:
        """Checks the values."""
        check_choice("patch.shape", self.shape, PatchShape)
        check_choice("patch.inner", self.inner, Inner)
        check_choice("patch.places", self.places, Places)
        check_not_negative("patch.radius", self.radius or 0)
        check_positive("patch.num_masks", self.num_masks)
        if self.places == "grid" and math.isqrt(self.num_masks) ** 2 != self.num_masks:
            raise ConfigError(
                f"patch.num_masks={self.num_masks}: patch.places=grid needs a square number, such "
                "as 4 or 9."
            )

    def __call__(
        self,
        images: Tensor,
        predict: Callable[[Tensor], Tensor],
        predict_exactly: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Scores of a batch.

        Args:
            images: (B, 3, H, W), in [0, 1].
            predict: Maps images to logits (B, K), differentiably.
            predict_exactly: The same in float32, in which the scores are computed.
            generator: Of places and starts, on the device of the images.

        Returns:
            (B,), in nats.
        """
        size, before, changes = images.shape[-1], predict_exactly(images), []
        radius = size // 8 if self.radius is None else self.radius
        for patch in range(self.num_masks):
            centres = self._centres(patch, images, generator)
            mask = patch_mask(centres, radius, size, self.shape)
            moved = adversarial_patch(
                images, before, mask, predict, self.pgd, self.inner, generator
            )
            changes.append(prediction_change(before, predict_exactly(moved)))
        return torch.stack(changes).amin(0).clamp(min=0)  # rounding may leave less

    def _centres(self, patch: int, images: Tensor, generator: torch.Generator) -> Tensor:
        size, count, device = images.shape[-1], len(images), images.device
        if self.places == "grid":
            return grid_centres(self.num_masks, size)[patch].to(device).expand(count, 2)
        return torch.randint(size, (count, 2), generator=generator, device=device)
