"""Reads what runs recorded, and writes tables of it."""

from bdclean.reporting.records import Record, Run
from bdclean.reporting.results import Cell, Results, Row, Selection, Table

__all__ = ["Cell", "Record", "Results", "Row", "Run", "Selection", "Table"]
