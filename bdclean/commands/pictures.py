"""What the commands that draw a picture have in common: the PNG file given as `--out`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bdclean.errors import ConfigError, FileError
from bdclean.figures.png import save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_path(out: str | Path, *, overwrite: bool = True) -> Path:
    """The path of a picture, checked before work on it begins.

    Args:
        out: The file.
        overwrite: Whether it may exist.

    Raises:
        ConfigError: If it is not named as a PNG, is there already, or cannot be written there.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out={out}: the picture is a PNG; end the name in .png.")
    if not overwrite and os.path.lexists(out):
        raise ConfigError(f"--out={out}: the file exists; name a new one, or give --overwrite.")
    if out.is_dir():
        raise ConfigError(f"--out={out}: it is a folder; name a file.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--out={out}: {above} cannot be written into; name another place.")
    return out


def save_picture(figure: "Figure", out: Path) -> None:
    """Writes the picture as a whole or not at all; one that exists is replaced.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        save_png(figure, out)
    except FileError as error:
        raise ConfigError(f"--out={out}: {error}") from error
