"""Weights files in and out, and the names in them. The only room that reads a weights file."""

from bdclean.weights.format import read, write
from bdclean.weights.match import KeyReport, bare, match, unwrap

__all__ = ["KeyReport", "bare", "match", "read", "unwrap", "write"]
