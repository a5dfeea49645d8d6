"""A figure as a PNG."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from bdclean.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110


def to_png(figure: "Figure") -> bytes:
    """The content of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def save_png(figure: "Figure", path: str | Path) -> None:
    """Writes the picture whole or not at all; one that exists is replaced.

    Raises:
        FileError: If it cannot be written.
    """
    write_bytes(path, to_png(figure))
