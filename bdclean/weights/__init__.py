"""Weights files in and out, and the names in them. The only room that reads a weights file."""

from bdclean.weights.described import FileFacts, describe
from bdclean.weights.format import check_plain, read, read_nests, write, write_torch
from bdclean.weights.kinds import TORCH_SUFFIXES
from bdclean.weights.match import KeyReport, Place, Spelling, match, places, unwrap
from bdclean.weights.nests import Nest
from bdclean.weights.plain import bytes_of, multiplied_out

__all__ = [
    "TORCH_SUFFIXES",
    "FileFacts",
    "KeyReport",
    "Nest",
    "Place",
    "Spelling",
    "bytes_of",
    "check_plain",
    "describe",
    "match",
    "multiplied_out",
    "places",
    "read",
    "read_nests",
    "unwrap",
    "write",
    "write_torch",
]
