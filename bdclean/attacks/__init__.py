"""Backdoor attacks: triggers, the selection of rows, and the labels. Knows no data set."""

from bdclean.attacks.badnets import BadNets
from bdclean.attacks.base import Attack, FurtherTest
from bdclean.attacks.blend import Blend
from bdclean.attacks.checks import LabelRule, Quantize, RateBase
from bdclean.attacks.input_aware import InputAware
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.sig import SIG
from bdclean.attacks.trigger import Trigger

__all__ = [
    "SIG",
    "Attack",
    "BadNets",
    "Blend",
    "FurtherTest",
    "InputAware",
    "LabelRule",
    "PoisonPlan",
    "Quantize",
    "RateBase",
    "Trigger",
]
