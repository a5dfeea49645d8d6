"""What gradient ascent climbs, to make a network forget samples."""

import math

from torch import Tensor
from torch.nn.functional import cross_entropy


def capped_cross_entropy(logits: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    """Computes the mean over the batch of min(l, cap), l the cross-entropy of each sample.

    A sample at the cap gives no gradient, so that gradient ascent ends there.

    Args:
        logits: (B, K).
        labels: (B,).
        cap: In nats; None leaves the cross-entropy as it is.

    Returns:
        A scalar, computed in float32.
    """
    losses = cross_entropy(logits.float(), labels, reduction="none")
    return _capped(losses, cap).mean()


def descent_and_ascent(
    logits: Tensor, labels: Tensor, forget: Tensor, weight: float, cap: float | None
) -> Tensor:
    """Computes w E[l] over the samples to keep less E[min(l, cap)] over those to forget.

    Both means are estimated with B / 2 as their size, so a batch may lack one kind.

    Args:
        logits: (B, K).
        labels: (B,).
        forget: (B,), bool; about half of it.
        weight: w.
        cap: As in `capped_cross_entropy`.

    Returns:
        A scalar, computed in float32.
    """
    losses = cross_entropy(logits.float(), labels, reduction="none")
    return 2 * (weight * losses).where(~forget, -_capped(losses, cap)).mean()


def _capped(losses: Tensor, cap: float | None) -> Tensor:
    return losses.clamp(max=math.inf if cap is None else cap)
