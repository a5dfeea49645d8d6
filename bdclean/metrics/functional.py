"""Counting, as pure functions: predictions, hits, percentages."""

import math

import torch
from torch import Tensor

from bdclean.errors import DataError


def predicted_classes(outputs: Tensor) -> Tensor:
    """Turns the outputs of a classifier into class indices.

    Args:
        outputs: Logits or probabilities (B, K), or class indices (B,) of an integer type.

    Returns:
        Class indices (B,). Equal scores are settled as `torch.argmax` does.

    Raises:
        DataError: The outputs have neither of the two forms.
    """
    if outputs.ndim == 2 and outputs.is_floating_point():
        return outputs.argmax(dim=1)
    integral = not outputs.is_floating_point() and not outputs.is_complex()
    if outputs.ndim == 1 and integral and outputs.dtype != torch.bool:
        return outputs
    raise DataError(
        f"outputs of shape {tuple(outputs.shape)} and type {outputs.dtype} cannot be scored; "
        "give logits (B, K) of a floating type or class indices (B,) of an integer type"
    )


def hit_count(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Counts the samples that are predicted as `wanted`.

    Args:
        outputs: Logits (B, K) or class indices (B,).
        wanted: Class indices (B,).

    Returns:
        The number of hits, a scalar of type long on the device of the outputs.

    Raises:
        DataError: The outputs cannot be scored, or `wanted` has another length.
    """
    classes = predicted_classes(outputs)
    if classes.shape != wanted.shape:
        raise DataError(
            f"{classes.numel()} predictions meet labels of shape {tuple(wanted.shape)}; "
            "give one label for each prediction, of shape (B,)"
        )
    return (classes == wanted).sum()


def percentage(hits: Tensor, total: Tensor) -> Tensor:
    """Returns `100 * hits / total` as float32; NaN where the total is 0."""
    return 100.0 * hits.float() / total.float()


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share (Wilson, JASA 1927), in percent.

    It holds for one network on samples of one kind, and says nothing of other networks or seeds.

    Args:
        hits: From 0 to `total`.
        total: Above 0.
        z: Quantile of the normal distribution; the default gives 95 %.

    Raises:
        DataError: There is no sample, or more hits than samples.
    """
    if not 0 <= hits <= total or total == 0:
        raise DataError(f"{hits} hits of {total} samples have no interval.")
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
