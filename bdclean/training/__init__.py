"""Modules that make a model."""

from bdclean.training.adversarial import AdversarialTraining
from bdclean.training.clean_part import CleanPart
from bdclean.training.input_aware import InputAwareTraining
from bdclean.training.knn import KNN
from bdclean.training.linear_probe import LinearProbe
from bdclean.training.simclr import SimCLR
from bdclean.training.supervised import Supervised

__all__ = [
    "KNN",
    "AdversarialTraining",
    "CleanPart",
    "InputAwareTraining",
    "LinearProbe",
    "SimCLR",
    "Supervised",
]
