"""What the commands that draw a picture have in common: the PNG file given as `--out`."""

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
        ConfigError: If it is not named as a PNG, or is there already.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out={out}: the picture is a PNG; end the name in .png.")
    if not overwrite and out.exists():
        raise ConfigError(f"--out={out}: the file exists; name a new one, or give --overwrite.")
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
