"""Rows of results, and the three ways to show them: a table, a JSON file, an HTML page."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from rich.table import Table

from bdclean.files import write_text

COLUMNS = ("method", "labels used", "ACC", "ASR", "PA", "seconds")
NOTE = (
    "ACC: percent of {n_clean} clean test images that are recognised. ASR and PA: percent of "
    "{n_triggered} triggered test images, none of the target class, that are answered with the "
    "target, and with their true class. Seconds: training alone. Compare a purified row with the "
    "victim's row under the same kind of head."
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #bbb; padding: .3rem .8rem; text-align: right; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{introduction}</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<p>{note}</p>
{figures}
<h2>Settings</h2>
<pre>{settings}</pre>
</body>
</html>
"""


@dataclass(frozen=True)
class Row:
    """One line of the table; the fields are the keys of results.json.

    Attributes:
        method: What was done, and which head answers.
        labels: Which labels that took.
        acc: Accuracy on clean test images, in percent.
        asr: Success rate of the attack, in percent.
        pa: Accuracy on triggered test images, in percent.
        n_clean: Clean test images.
        n_triggered: Triggered test images.
        seconds: Of training, without evaluation.
    """

    method: str
    labels: str
    acc: float
    asr: float
    pa: float
    n_clean: int
    n_triggered: int
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """As shown, in the order of `COLUMNS`."""
        numbers = (self.acc, self.asr, self.pa, self.seconds)
        return (self.method, self.labels, *(f"{number:.1f}" for number in numbers))


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        heading: Above it.
        caption: Below it.
        png: The content of a PNG file.
    """

    heading: str
    caption: str
    png: bytes

    @property
    def address(self) -> str:
        """The picture itself, as an address of a page."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    result = Table()
    for number, name in enumerate(COLUMNS):
        result.add_column(name, justify="left" if number < 2 else "right", no_wrap=number != 1)
    for row in rows:
        result.add_row(*row.cells())
    return result


def note(rows: Sequence[Row]) -> str:
    """What the columns mean."""
    return NOTE.format(n_clean=rows[0].n_clean, n_triggered=rows[0].n_triggered)


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes a list of one dictionary per row."""
    write_text(path, json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def write_html(
    path: Path,
    title: str,
    introduction: str,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    settings: str,
) -> None:
    """Writes a page that needs no other file."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) + "</tr>"
        for row in rows
    )
    figures = "\n".join(
        f"<h2>{escape(p.heading)}</h2>\n"
        f'<img alt="{escape(p.heading)}" src="{p.address}">\n'
        f"<p>{escape(p.caption)}</p>"
        for p in pictures
    )
    page = _PAGE.format(
        title=escape(title),
        introduction=escape(introduction),
        head=head,
        body=body,
        note=escape(note(rows)),
        figures=figures,
        settings=escape(settings),
    )
    write_text(path, page)
