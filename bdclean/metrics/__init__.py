"""What is measured: clean accuracy, attack success rate, poisoned accuracy."""

from bdclean.metrics.backdoor import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy
from bdclean.metrics.scores import DEFINITIONS, Scores

__all__ = ["DEFINITIONS", "AttackSuccessRate", "CleanAccuracy", "PoisonedAccuracy", "Scores"]
