"""Modules that make a model."""

from bdclean.training.adversarial import AdversarialTraining
from bdclean.training.input_aware import InputAwareTraining
from bdclean.training.linear_probe import LinearProbe
from bdclean.training.supervised import Supervised

__all__ = ["AdversarialTraining", "InputAwareTraining", "LinearProbe", "Supervised"]
