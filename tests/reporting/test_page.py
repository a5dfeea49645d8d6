"""Table and page from rows that were made up."""

from io import StringIO

import pytest
from rich.console import Console

from bdclean.reporting import page as report

ROWS = [
    report.Row("victim", "1,000 (100 poisoned)", 98.25, 100.0, 0.0, 400, 360, 21.04),
    report.Row("BCU <new>", "none", 97.0, 1.25, 96.0, 400, 360, 9.96),
]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_shows_the_rows(width):
    console = Console(file=StringIO(), width=width)
    console.print(report.table(ROWS))
    lines = console.file.getvalue().splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("│┃").split("│")) for line in lines]
    assert ("victim", "1,000 (100 poisoned)", "98.2", "100.0", "0.0", "21.0") in cells
    assert ("BCU <new>", "none", "97.0", "1.2", "96.0", "10.0") in cells
    assert len(lines) == len(ROWS) + 4  # three rules and the head
    assert all(len(line) <= 80 for line in lines)


def test_a_markup_sign_is_escaped(tmp_path):
    path = tmp_path / "page.html"
    picture = report.Picture("a & b", "caption", bytes(3))
    report.write_html(path, "title", "intro {braces}", ROWS, [picture], '{"a": "<b>"}')
    page = path.read_text()
    assert "BCU &lt;new&gt;" in page
    assert "<new>" not in page
    assert "a &amp; b" in page
    assert 'src="data:image/png;base64,AAAA"' in page
    assert "intro {braces}" in page
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_note_counts_the_images():
    assert "400 clean" in report.note(ROWS)
    assert "360 triggered" in report.note(ROWS)
