"""Learning-rate schedules by name, one step of the schedule per training step."""

from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

Schedule = Literal["constant", "cosine", "multistep", "onecycle"]


def make_schedule(
    optimizer: Optimizer,
    name: Schedule,
    total_steps: int,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> LRScheduler:
    """Builds a schedule over `total_steps` training steps.

    Args:
        optimizer: Its learning rate is the starting rate, for `onecycle` the highest one.
        name: `constant`, `cosine` (to zero), `multistep`, or `onecycle`; the momentum stays.
        total_steps: Length of the training.
        milestones: For `multistep`: where the rate is multiplied by `gamma`, as fractions of
            the training.
        gamma: For `multistep`.
    """
    steps = max(1, total_steps)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if name == "multistep":
        return MultiStepLR(optimizer, [round(m * steps) for m in milestones], gamma)
    if name == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=steps, cycle_momentum=False)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)
