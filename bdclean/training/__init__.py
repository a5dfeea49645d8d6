"""Modules that make a model."""

from bdclean.training.linear_probe import LinearProbe
from bdclean.training.supervised import Supervised

__all__ = ["LinearProbe", "Supervised"]
