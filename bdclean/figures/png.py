"""A figure as a PNG."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from bdclean.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

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


def pixels_to_png(pixels: "Tensor") -> bytes:
    """The content of a PNG file of one image, (3, H, W), uint8."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="png")
    return buffer.getvalue()
