"""Defences of a labelled training set: one file per method, each readable beside its paper."""

from bdclean.sifting.abl import ABL
from bdclean.sifting.advrbd import AdvrBD
from bdclean.sifting.base import Sifter
from bdclean.sifting.dbr import DBR
from bdclean.sifting.rounds import Rounds
from bdclean.sifting.scan import SCAn

__all__ = ["ABL", "DBR", "AdvrBD", "Rounds", "SCAn", "Sifter"]
