"""Samples chosen by their rank: so many of all, whatever the scores are."""

import math

import torch
from torch import Tensor

from bdclean.errors import ConfigError


def share_of(size: int, fraction: float) -> int:
    """Returns floor(fraction * size); 0.29 of 100 is 29, although 0.29 * 100 < 29 in floats."""
    return int(round(fraction * size, 6))


def lowest(scores: Tensor, fraction: float) -> Tensor:
    """Marks the floor(fraction * N) lowest scores; of equal ones the first count as lower.

    Args:
        scores: (N,).
        fraction: In [0, 1].

    Returns:
        (N,), bool. With `highest` and fractions that add up to at most 1, nothing is in both.

    Raises:
        ConfigError: If a score is not a number.
    """
    order = _ascending(scores)
    return _mask(order[: share_of(len(scores), fraction)], len(scores))


def highest(scores: Tensor, fraction: float) -> Tensor:
    """Marks the floor(fraction * N) highest scores; see `lowest`."""
    order = _ascending(scores)
    return _mask(order[len(scores) - share_of(len(scores), fraction) :], len(scores))


def highest_of_each(
    scores: Tensor, labels: Tensor, taken: Tensor, fraction: float, most: float = math.inf
) -> Tensor:
    """Marks more of each label, from the highest score on, until floor(fraction * N_k) are marked.

    At least one of each label is marked.

    Args:
        scores: (N,).
        labels: (N,).
        taken: What is marked already, (N,), bool; its scores are not read.
        fraction: In [0, 1], of the N_k samples of each label.
        most: A label with more samples counts as if it had so many.

    Returns:
        (N,), bool; all of `taken` is in it. Of equal scores the first counts as higher.
    """
    marked = taken.clone()
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().flatten()
        free = rows[~taken[rows]]
        wanted = share_of(int(min(len(rows), most)), fraction)
        missing = max(wanted, 1) - (len(rows) - len(free))
        marked[free[scores[free].argsort(descending=True, stable=True)[: max(missing, 0)]]] = True
    return marked


def fewest_rounds(
    rounds: Tensor, scores: Tensor, labels: Tensor, below: float, share: float
) -> Tensor:
    """Marks what few of the rounds mark, and of each label as many as bring its share.

    The share is of no more samples than half of the labels have: poisoned samples make a label
    large, and it shall not lend more of them.

    Args:
        rounds: (R, N), bool.
        scores: (N,), finite; the order of samples that as many rounds mark, highest first.
        labels: (N,).
        below: What fewer of the rounds than this share mark is marked at once.
        share: Of each label, in [0, 1]; one sample at least.

    Returns:
        (N,), bool.
    """
    often = rounds.double().mean(0)
    place = scores.argsort(stable=True).argsort() / len(scores)  # below 1
    sizes = labels.bincount()
    most = float(sizes[sizes > 0].median())
    return highest_of_each(place - rounds.sum(0), labels, often < below, share, most)


def _ascending(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise ConfigError(
            "The scores of some samples are not numbers, because the training diverged; lower its "
            "learning rate."
        )
    return scores.argsort(stable=True)


def _mask(rows: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool, device=rows.device)
    mask[rows] = True
    return mask
