"""Purifiers of a model: one file per method, each readable beside its paper."""

from bdclean.purification.base import Purifier
from bdclean.purification.bcu import BCU
from bdclean.purification.cbd import CBD
from bdclean.purification.projection import Projection

__all__ = ["BCU", "CBD", "Projection", "Purifier"]
