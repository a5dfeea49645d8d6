"""The diversity loss of the input-aware attack (Nguyen and Tran, NeurIPS 2020)."""

from torch import Tensor

_EPSILON = 1e-7


def diversity(first: Tensor, second: Tensor, of_first: Tensor, of_second: Tensor) -> Tensor:
    """L_div = mean_i d(x1_i, x2_i) / (d(t1_i, t2_i) + 1e-7), d the root of the mean square.

    Small where unlike images get unlike patterns or masks.

    Args:
        first: x1, (B, 3, H, W), B > 0.
        second: x2, likewise.
        of_first: t1, what a network makes of x1, (B, C, H, W).
        of_second: t2, what it makes of x2.
    """
    images, made = _distance(first, second), _distance(of_first, of_second)
    return (images / (made + _EPSILON)).mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # The root has no finite derivative at 0, which two saturated masks reach.
    return (a - b).square().mean((1, 2, 3)).clamp_min(_EPSILON**2).sqrt()
