"""Weights files in and out, and the names in them. The only room that reads a weights file."""

from bdclean.weights.format import check_plain, read, read_nests, write, write_torch
from bdclean.weights.kinds import TORCH_SUFFIXES
from bdclean.weights.match import KeyReport, Place, Spelling, match, places, unwrap
from bdclean.weights.nests import Nest
from bdclean.weights.plain import multiplied_out

__all__ = [
    "TORCH_SUFFIXES",
    "KeyReport",
    "Nest",
    "Place",
    "Spelling",
    "check_plain",
    "match",
    "multiplied_out",
    "places",
    "read",
    "read_nests",
    "unwrap",
    "write",
    "write_torch",
]
