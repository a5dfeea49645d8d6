"""Text that comes from a file, as it is shown: names of tensors, folders and files, metadata.

Such text may hold anything: newlines that forge a line of ours, escape sequences that drive a
terminal, formulas that a spreadsheet runs. All of it goes through here before it is shown.
"""

import re
import unicodedata

_RUN_BY_SPREADSHEETS = ("=", "+", "-", "@", "\t", "\r")
_MARK = "'"
_ESCAPE = re.compile(r"\\(?:\\|t|r|x[0-9a-f]{2})")


def printable(text: object) -> str:
    """One line without control characters: these, newlines too, are shown as escapes.

    Characters that a terminal hides or uses to turn text around are escaped as well, and the bytes
    of file names that are not UTF-8. What is printable stays, so text may go through twice.
    """
    return "".join(c if _is_shown(c) else _escaped(c) for c in str(text))


def cell(text: str) -> str:
    """Text for a CSV file that a spreadsheet may open; `text_of_cell` gives it back.

    What would be a formula there begins with an apostrophe. Control characters are escaped, but for
    newlines, which CSV has quotes for, and so is the backslash.
    """
    begins = (*_RUN_BY_SPREADSHEETS, _MARK)
    kept = "".join(_escaped(c) if _is_escaped_in_cells(c) else c for c in text)
    return f"{_MARK}{kept}" if text.startswith(begins) else kept


def text_of_cell(text: str) -> str:
    """The text that `cell` was given."""
    return _ESCAPE.sub(lambda found: _unescaped(found[0]), text.removeprefix(_MARK))


def _is_escaped_in_cells(character: str) -> bool:
    return character == "\\" or (unicodedata.category(character) == "Cc" and character != "\n")


def _unescaped(escape: str) -> str:
    return escape.encode("ascii").decode("unicode_escape")


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # blanks


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
