"""Defences of a labelled training set: one file per method, each readable beside its paper."""

from bdclean.sifting.base import Sifter as Sifter
from bdclean.sifting.rounds import Rounds as Rounds

# isort: split
# One line for each method; `import X as X` offers it here as well.
from bdclean.sifting.abl import ABL as ABL
from bdclean.sifting.advrbd import AdvrBD as AdvrBD
from bdclean.sifting.dbr import DBR as DBR
from bdclean.sifting.scan import SCAn as SCAn
