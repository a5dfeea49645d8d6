"""Picture files of others: this is the one place that opens them.

Pillow takes a file for what its content is, whatever its name says. An EPS file named `photo.png`
would start Ghostscript. So only formats are opened whose decoders run in this process and ask for
no program, font or network. AVIF is not among them, because it depends on the version of Pillow
whether it can be decoded, and a data set must be the same on every machine.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Condition
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from bdclean.errors import BdcleanError, DataError, in_words

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MEMORY = 800_000_000
"""Bytes for pictures that are being decoded, of all threads together."""
MOST_OF_A_JPEG = 250_000_000
"""Pixels of a JPEG file for which its decoder may halve the sides on the way, to save memory."""

_PER_PIXEL, _OF_PROGRESSIVE, _OF_WEBP, _OF_TEXT = 8, 12, 16, 100
"""Bytes at the peak, as measured: with a copy in another mode, with coefficients, with canvases. A
PPM file of text is decoded in Python, which takes a second for each million pixels."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What the values of the EXIF tag ask for."""
_ORIENTATION = 0x0112
_READ = "BMP, JPEG, PNG, PPM, TIFF or WebP"
_CONVERT = f"convert it to {_READ}, or remove it"
_OTHERS = (
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"DDS ", "DDS"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML"),
    (0, b"<html", "a web page"),
    (0, b"<!doctype html", "a web page"),
    (0, b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the file"),
    (0, b"PK\3\4", "a zip archive"),
)
"""Contents under the name of a picture: offset, first bytes in lower or upper case, and a word."""


# Blocks above 32 MB go back to the system when they are freed. Of the usual 16 MB, those of another
# thread stay with the process, and the bound on memory would not hold.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]


class UnreadableError(DataError):
    """A picture file cannot be used.

    Args:
        file: Which.
        reason: Why, for brackets.
        cure: What to do.
        broken: Whether its content is the reason, and not the disk or the memory.
    """

    def __init__(
        self,
        file: str | Path,
        reason: str,
        cure: str = "repair or remove it",
        *,
        broken: bool = True,
    ) -> None:
        self.file, self.reason, self.cure, self.broken = file, reason, cure, broken
        super().__init__(f"{file} is not a readable image ({reason}); {cure}.")


class _Room:
    """Lets threads decode pictures at a time that fit into `MEMORY` together."""

    def __init__(self) -> None:
        self._left, self._changed = MEMORY, Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are left, of `MEMORY`."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


_ROOM = _Room()


def size_of(file: Path) -> tuple[int, int]:
    """Width and height as they are stored; nothing is decoded.

    Raises:
        UnreadableError: If the file is not a picture of one of `FORMATS`.
    """
    with _translated(file), _opened(file) as picture:
        return picture.size


@contextmanager
def decoded(
    file: Path, mode: Literal["RGB", "RGBA"] = "RGB", *, exif_orientation: bool = True
) -> Iterator[Image.Image]:
    """The first picture of a file, with 8 bits for each channel.

    Of 16 bits the upper 8 are taken, in grey as in colour. `RGB` shows the colours that are stored
    below transparent pixels. Others wait for the block if memory would be short.

    Args:
        file: Its content decides what it is, not its name.
        mode: Of the result.
        exif_orientation: Turn it as viewers of photos do. Pillow always turns a TIFF.

    Yields:
        The picture; a JPEG that is too large otherwise, with sides of half the length.

    Raises:
        UnreadableError: If the file is not a picture of one of `FORMATS`, is damaged or too large,
            or has values whose range nobody knows.
    """
    with ExitStack() as stack:
        with _translated(file):
            picture = stack.enter_context(_opened(file))
            stack.enter_context(_ROOM.taken(_needed(file, picture)))
            ready = _converted(file, picture, mode)
            turn = _turn(picture) if exif_orientation else None
            if turn is not None:
                ready = ready.transpose(turn)
        yield ready


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except _BOMB:  # Pillow's own bound; photos may be larger
        try:
            return JpegImageFile(file)
        except SyntaxError:
            raise _too_large(file, MEMORY // _PER_PIXEL) from None


@contextmanager
def _translated(file: Path) -> Iterator[None]:
    """Decoders raise whatever they like on damaged files; all of it becomes one sentence."""
    try:
        yield
    except BdcleanError:
        raise
    except UnidentifiedImageError as error:
        raise _of_another_kind(file) from error
    except MemoryError as error:
        raise UnreadableError(
            file, "there is too little memory", "make room or a smaller copy", broken=False
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            cure = "see that it is there and may be read"
            raise UnreadableError(file, error.strerror or str(error), cure, broken=False) from error
        raise UnreadableError(file, in_words(error)) from error


def _of_another_kind(file: Path) -> UnreadableError:
    with file.open("rb") as content:
        start = content.read(64)
    if not start:
        return UnreadableError(file, "it is empty")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for offset, first, word in _OTHERS:
        if start[offset:].startswith(first) or (not offset and text.startswith(first.lower())):
            return UnreadableError(file, f"it holds {word}", _CONVERT)
    return UnreadableError(file, f"it holds no picture in {_READ}")


def _too_large(file: Path, most: int) -> UnreadableError:
    many = f"it has more than {most // 1_000_000} million pixels, the most that is read of its kind"
    return UnreadableError(file, many, "make it smaller or remove it")


def _needed(file: Path, picture: Image.Image) -> int:
    """Bytes to decode a picture, at most `MEMORY`. A large JPEG is decoded smaller from here on."""
    per_pixel, width, height = _PER_PIXEL, *picture.size
    if picture.format == "WEBP":
        per_pixel = _OF_WEBP
    elif _is_text(picture):
        per_pixel = _OF_TEXT
    elif "progressive" in picture.info:
        per_pixel = _OF_PROGRESSIVE
    elif isinstance(picture, JpegImageFile) and width * height * per_pixel > MEMORY:
        if width * height > MOST_OF_A_JPEG:
            raise _too_large(file, MOST_OF_A_JPEG)
        picture.draft(None, (width // 2, height // 2))
        width, height = picture.size
    if width * height * per_pixel > MEMORY:
        raise _too_large(file, MEMORY // per_pixel)
    return width * height * per_pixel


def _is_text(picture: Image.Image) -> bool:
    tiles: tuple[tuple[str, ...], ...] = getattr(picture, "tile", ())
    return bool(tiles) and tiles[0][0] == "ppm_plain"


def _converted(file: Path, picture: Image.Image, mode: str) -> Image.Image:
    picture.load()
    stored, ready = picture.mode, picture
    if stored.startswith("I;16") or (stored == "I" and picture.format in ("PNG", "PPM")):
        ready = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif stored[0] in "IF":
        raise UnreadableError(
            file, f"mode {stored} has more than 8 bits of unknown range", "convert it to 8 bits"
        )
    if mode == "RGB":  # else Pillow warns of the transparency that it drops
        ready.info.pop("transparency", None)
    return ready if ready.mode == mode else ready.convert(mode)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What the EXIF data ask for; nothing where they are damaged."""
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # as viewers do
        return None
