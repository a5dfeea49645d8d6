"""CSV files of ours: this is the one place that writes them, and it reads them back.

Losses are the exception: Lightning writes `metrics.csv`, of names and numbers of ours.
"""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

from bdclean.errors import DataError
from bdclean.printable import cell, text_of_cell


class Number(str):
    """A number as it is to be written: no formula, whatever its sign."""

    __slots__ = ()


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file; `read_csv` reads it. Texts are written by `bdclean.printable.cell`.

    Args:
        lines: The names of the columns, and the lines below them.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in lines:
        writer.writerow([cell(value) if type(value) is str else value for value in line])
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file of ours by the names of their columns.

    Names of files and folders are those that `csv_text` was given.

    Raises:
        DataError: If there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing.")
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        return [
            {key: text_of_cell(value or "") for key, value in line.items() if key is not None}
            for line in csv.DictReader(lines)
        ]
