"""What is measured: clean accuracy, attack success rate and its floor, poisoned accuracy."""

from bdclean.metrics.backdoor import (
    AttackSuccessRate,
    CleanAccuracy,
    PoisonedAccuracy,
    SuccessFloor,
)
from bdclean.metrics.scores import DEFINITIONS, Scores

__all__ = [
    "DEFINITIONS",
    "AttackSuccessRate",
    "CleanAccuracy",
    "PoisonedAccuracy",
    "Scores",
    "SuccessFloor",
]
