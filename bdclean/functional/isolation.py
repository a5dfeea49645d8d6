"""Losses of anti-backdoor learning (ABL), which hold the training loss at a level.

Poisoned samples are learned first. A loss that is not allowed to fall below a level keeps the
clean samples from following them, so that the poisoned ones stand out by their low loss.

Source: Li, Lyu, Koren, Lyu, Li, Ma: Anti-Backdoor Learning, NeurIPS 2021 (code: bboylyg/ABL).
"""

from torch import Tensor


def local_gradient_ascent(loss: Tensor, level: float) -> Tensor:
    """Computes sign(l - level) * l, whose gradient climbs where the loss is below the level.

    At l = level it is 0, and so is its gradient.

    Args:
        loss: l, of any shape: one for each sample, or their mean.
        level: gamma in the paper.
    """
    return (loss - level).sign() * loss


def flooding(loss: Tensor, level: float) -> Tensor:
    """Computes |l - level| + level, whose gradient climbs where the loss is below the level.

    Ishida et al., ICML 2020.

    Args:
        loss: l, of any shape: one for each sample, or their mean.
        level: b in the paper.
    """
    return (loss - level).abs() + level
