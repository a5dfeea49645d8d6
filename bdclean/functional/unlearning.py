"""What gradient ascent climbs, to make a network forget samples."""

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
    return (losses if cap is None else losses.clamp(max=cap)).mean()
