"""Backdoor attacks: triggers, the selection of rows, and the labels. Knows no data set."""

from bdclean.attacks.adaptive_blend import AdaptiveBlend
from bdclean.attacks.adaptive_patch import AdaptivePatch
from bdclean.attacks.badnets import BadNets
from bdclean.attacks.base import Adversarial, Attack, FurtherTest
from bdclean.attacks.blend import Blend
from bdclean.attacks.checks import LabelRule, Quantize, RateBase
from bdclean.attacks.input_aware import InputAware
from bdclean.attacks.label_consistent import LabelConsistent
from bdclean.attacks.physical import PhysicalBA
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.sig import SIG
from bdclean.attacks.tact import TaCT
from bdclean.attacks.trigger import Trigger
from bdclean.attacks.wanet import WaNet

__all__ = [
    "SIG",
    "AdaptiveBlend",
    "AdaptivePatch",
    "Adversarial",
    "Attack",
    "BadNets",
    "Blend",
    "FurtherTest",
    "InputAware",
    "LabelConsistent",
    "LabelRule",
    "PhysicalBA",
    "PoisonPlan",
    "Quantize",
    "RateBase",
    "TaCT",
    "Trigger",
    "WaNet",
]
