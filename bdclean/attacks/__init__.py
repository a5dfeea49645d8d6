"""Backdoor attacks: triggers, the selection of rows, and the labels. Knows no data set."""

from bdclean.attacks.base import Attack as Attack
from bdclean.attacks.checks import LabelRule as LabelRule
from bdclean.attacks.checks import Quantize as Quantize
from bdclean.attacks.checks import RateBase as RateBase
from bdclean.attacks.parts import Adversarial as Adversarial
from bdclean.attacks.parts import FurtherTest as FurtherTest
from bdclean.attacks.plan import PoisonPlan as PoisonPlan
from bdclean.attacks.trigger import Trigger as Trigger

# isort: split
# One line for each attack; `import X as X` offers it here as well.
from bdclean.attacks.adaptive_blend import AdaptiveBlend as AdaptiveBlend
from bdclean.attacks.adaptive_patch import AdaptivePatch as AdaptivePatch
from bdclean.attacks.badnets import BadNets as BadNets
from bdclean.attacks.blend import Blend as Blend
from bdclean.attacks.input_aware import InputAware as InputAware
from bdclean.attacks.label_consistent import LabelConsistent as LabelConsistent
from bdclean.attacks.physical import PhysicalBA as PhysicalBA
from bdclean.attacks.sig import SIG as SIG
from bdclean.attacks.tact import TaCT as TaCT
from bdclean.attacks.wanet import WaNet as WaNet
