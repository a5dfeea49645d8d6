"""Text that comes from files, as it is shown and as it stands in tables."""

import csv
from io import StringIO

import pytest

from bdclean.printable import cell, printable, text_of_cell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("ä 図 1\u3000x", "ä 図 1\u3000x"),
        ("a\nbdclean: all is well", "a\\nbdclean: all is well"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\r\t\0\x7f\x9b", "\\r\\t\\x00\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\udce9.png", "\\udce9.png"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_what_is_not_printable_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    assert printable(ValueError(text)) == shown
    printable(text).encode()


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "'quoted", "plain", ""])
def test_no_cell_is_a_formula_and_each_is_read_back(text):
    file = StringIO()
    csv.writer(file).writerow([cell(text)])
    (row,) = csv.reader(StringIO(file.getvalue()))
    shown = row[0] if row else ""
    assert not shown.startswith(("=", "+", "-", "@"))
    assert text_of_cell(shown) == text


def test_cells_hold_no_control_characters_but_newlines():
    assert cell("\x1b[31m/a\nb.png") == "\\x1b[31m/a\nb.png"
    assert cell("\t=1") == "'\\t=1"
