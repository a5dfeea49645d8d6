"""Rows of results, and the three ways to show them: a table, a JSON file, an HTML page."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from rich.table import Table

from bdclean.files import write_text
from bdclean.printable import printable

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
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """:root {
  color-scheme: light dark;
  --ink: #1d2127; --soft: #59616e; --line: #d5d9df; --ground: #fff; --panel: #f4f5f7;
  --alarm: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7ec; --soft: #a0a8b5; --line: #3b424d; --ground: #15181c; --panel: #1f242b;
    --alarm: #ff8f85;
  }
}
body {
  font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; }
small, .soft, figcaption { color: var(--soft); font-size: .875rem; line-height: 1.4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td {
  border-bottom: 1px solid var(--line); padding: .45rem 1rem .45rem 0; text-align: left;
  vertical-align: top;
}
th { font-weight: 600; }
th.number { text-align: right; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; }
pre {
  background: var(--panel); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto;
  font-size: .875rem; overflow-wrap: normal;
}
img { max-width: 100%; }
.alarm { color: var(--alarm); font-weight: 600; }
.answer { border-left: 4px solid var(--line); padding: .1rem 0 .1rem 1rem; }
.strip { display: flex; flex-wrap: wrap; gap: 1.4rem 2rem; margin-top: 1rem; }
.strip figure { margin: 0; flex: 0 1 24rem; }
.strip .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; }
.strip img { width: 100%; image-rendering: pixelated; border-radius: 3px; }
dl { margin: 0; max-width: 52rem; }
dt { color: var(--soft); font-size: .875rem; margin-top: .5rem; }
dd { margin: 0; }
@media (min-width: 40rem) {
  dl { display: grid; grid-template-columns: 14rem 1fr; gap: .4rem 1rem; }
  dt { margin: 0; line-height: 1.7; }
}
figcaption { margin-top: .4rem; }
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
    figures = "\n".join(
        f"<h2>{escape(p.heading)}</h2>\n"
        f'<img alt="{escape(p.heading)}" src="{p.address}">\n'
        f"<p>{escape(p.caption)}</p>"
        for p in pictures
    )
    body = "\n".join(
        [
            f"<p>{escape(introduction)}</p>",
            html_table(COLUMNS, [[escape(cell) for cell in row.cells()] for row in rows], text=2),
            f"<p>{escape(note(rows))}</p>",
            figures,
            f"<h2>Settings</h2>\n<pre>{escape(settings)}</pre>",
        ]
    )
    write_text(path, shell(title, body))


def shell(title: str, body: str) -> str:
    """A page that asks for nothing beside itself: no script, no network.

    Args:
        title: Plain text.
        body: HTML, below the title.
    """
    return _PAGE.format(title=escape(title), policy=_POLICY, style=_STYLE, body=body)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table, which scrolls by itself where the page is narrow.

    Args:
        head: Plain text.
        rows: HTML, a cell each.
        text: How many columns are no numbers; all others are set to the right.
    """
    top = "".join(
        f"<th>{escape(printable(name))}</th>"
        if column < text
        else f'<th class="number">{escape(printable(name))}</th>'
        for column, name in enumerate(head)
    )
    lines = [
        "".join(
            f"<td>{cell}</td>" if column < text else f'<td class="number">{cell}</td>'
            for column, cell in enumerate(row)
        )
        for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )
