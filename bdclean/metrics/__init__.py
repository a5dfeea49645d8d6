"""What is measured: clean accuracy, attack success rate, poisoned accuracy."""

from bdclean.metrics.backdoor import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy
from bdclean.metrics.evaluation import BackdoorModule

__all__ = ["AttackSuccessRate", "BackdoorModule", "CleanAccuracy", "PoisonedAccuracy"]
