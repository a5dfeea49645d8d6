"""A report as data, and its two forms: a page for a browser and Markdown.

All text is plain: whatever a file name or a class name holds is escaped here, and nowhere else.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from bdclean.markdown import code_block, plain
from bdclean.printable import printable
from bdclean.reporting.page import html_table, shell


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        detail: Below it, smaller.
        alarm: Whether it stands out.
    """

    text: str
    detail: str = ""
    alarm: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: Names of the columns.
        rows: Cells, as many as columns.
        text: How many columns are no numbers.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text: int = 1


@dataclass(frozen=True)
class Strip:
    """A few small pictures in a row, for the page alone.

    Attributes:
        caption: Below them.
        pictures: What each shows, and the content of its PNG file.
    """

    caption: tuple[str, ...]
    pictures: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, in this order.

    Attributes:
        heading: Its name.
        text: Paragraphs.
        table: A table.
        strips: Pictures; a section of pictures alone is left out of Markdown.
        code: Lines of code.
        points: A list.
        facts: Pairs of a word and what it is.
    """

    heading: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    strips: tuple[Strip, ...] = ()
    code: str | None = None
    points: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: Its name.
        answer: What a reader in a hurry wants to know, in paragraphs.
        sections: The rest.
        mark: A comment that tells the writer's own files from others.
    """

    title: str
    answer: tuple[str, ...]
    sections: tuple[Section, ...]
    mark: str


# ---------------------------------------------------------------------- a page


def to_html(document: Document) -> str:
    """The report as one page that needs no other file."""
    answer = "\n".join(f"<p>{_html(each)}</p>" for each in document.answer)
    parts = [f"<!-- {document.mark} -->", f'<div class="answer">\n{answer}\n</div>']
    parts += [part for section in document.sections for part in _html_section(section)]
    return shell(printable(document.title), "\n".join(parts))


def _html_section(section: Section) -> Iterator[str]:
    yield f"<h2>{_html(section.heading)}</h2>"
    for paragraph in section.text:
        yield f"<p>{_html(paragraph)}</p>"
    if section.table is not None:
        rows = [[_html_cell(cell) for cell in row] for row in section.table.rows]
        yield html_table(section.table.head, rows, section.table.text)
    if section.strips:
        strips = "\n".join(_html_strip(strip) for strip in section.strips)
        yield f'<div class="strip">\n{strips}\n</div>'
    if section.code is not None:
        yield f"<pre>{escape(section.code)}</pre>"
    if section.points:
        yield "<ul>" + "\n".join(f"<li>{_html(point)}</li>" for point in section.points) + "</ul>"
    if section.facts:
        pairs = (f"<dt>{_html(word)}</dt><dd>{_html(fact)}</dd>" for word, fact in section.facts)
        yield "<dl>\n" + "\n".join(pairs) + "\n</dl>"


def _html_cell(cell: Cell) -> str:
    text = f'<span class="alarm">{_html(cell.text)}</span>' if cell.alarm else _html(cell.text)
    return f"{text}<small>{_html(cell.detail)}</small>" if cell.detail else text


def _html_strip(strip: Strip) -> str:
    pictures = "".join(
        f'<img alt="{_html(shows)}" title="{_html(shows)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for shows, png in strip.pictures
    )
    lines = "<br>".join(_html(line) for line in strip.caption)
    return f'<figure><div class="three">{pictures}</div><figcaption>{lines}</figcaption></figure>'


def _html(text: str) -> str:
    return escape(printable(text)).replace(" %", "\u00a0%")  # no line begins with it


# ---------------------------------------------------------------------- Markdown


def to_markdown(document: Document) -> str:
    """The report as Markdown, without its pictures."""
    parts = [f"<!-- {document.mark} -->", f"# {plain(document.title)}"]
    parts += [plain(each) for each in document.answer]
    for section in document.sections:
        if not section.strips:
            parts += _markdown_section(section)
    return "\n\n".join(parts) + "\n"


def _markdown_section(section: Section) -> Iterator[str]:
    yield f"## {plain(section.heading)}"
    yield from (plain(paragraph) for paragraph in section.text)
    if section.table is not None:
        head = [plain(name) for name in section.table.head]
        lines = [head, ["---"] * len(head), *(map(_cell, row) for row in section.table.rows)]
        yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if section.code is not None:
        yield code_block(section.code)
    if section.points:
        yield "\n".join(f"- {plain(point)}" for point in section.points)
    if section.facts:
        yield "\n".join(f"- {plain(word)}: {plain(fact)}" for word, fact in section.facts)


def _cell(cell: Cell) -> str:
    text = f"**{plain(cell.text)}**" if cell.alarm else plain(cell.text)
    return f"{text}<br>{plain(cell.detail)}" if cell.detail else text
