"""Defences: one file per method, each readable beside its paper."""

from bdclean.purification.abl import ABL
from bdclean.purification.advrbd import AdvrBD
from bdclean.purification.base import Purifier
from bdclean.purification.bcu import BCU
from bdclean.purification.cbd import CBD
from bdclean.purification.dataset import DatasetDefense
from bdclean.purification.dbr import DBR
from bdclean.purification.recipe import Recipe
from bdclean.purification.scan import SCAn
from bdclean.purification.staged import Stage, StagedPurifier

__all__ = [
    "ABL",
    "BCU",
    "CBD",
    "DBR",
    "AdvrBD",
    "DatasetDefense",
    "Purifier",
    "Recipe",
    "SCAn",
    "Stage",
    "StagedPurifier",
]
