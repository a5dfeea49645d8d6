"""Image files to uint8 arrays, decoded once into a memory-mapped file of the user's cache."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tv

from bdclean.errors import DataError, FileError
from bdclean.files import replacing, write_text
from bdclean.pictures import MEMORY, UnreadableError, decoded
from bdclean.progress import follow

Resizing = Literal["fill", "stretch", "imagenet"]
"""How a picture of another size becomes a square of side S.

`fill`: the centre square, resized (bicubic). `stretch`: both sides to S, whatever the proportions
(bilinear). `imagenet`: the shorter side to S * 256 / 224 (bilinear), then the centre; always, as in
the usual test pipeline.
"""

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Reading:
    """How image files are read.

    Attributes:
        cache: Keep the decoded images in the user's cache folder.
        exif_orientation: Turn photos as viewers do.
        on_error: What to do with a broken file: `raise` an error, or `skip` the file.
    """

    cache: bool = True
    exif_orientation: bool = True
    on_error: OnError = "raise"


@dataclass(frozen=True)
class Decoded:
    """What image files hold.

    Attributes:
        images: (M, 3, S, S), uint8, of the files that can be read, in their order.
        broken: Why the others cannot, by their positions, ascending.
    """

    images: Tensor
    broken: Mapping[int, UnreadableError]


# Formats in which two pictures of one size have files of one size: unpacked with equal dates, a
# clean and a poisoned copy of a data set would have one key.
_PLAIN = frozenset({".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAY_OUT = (
    "set the environment variable XDG_CACHE_HOME to a folder on a larger disk, or set "
    "--data.cache to false to hold them in memory."
)


def load_images(
    files: Sequence[Path],
    names: Sequence[str],
    input_size: int,
    *,
    resizing: Resizing = "fill",
    reading: Reading = Reading(),
) -> Decoded:
    """Decodes image files, or maps what an earlier call has decoded.

    With `reading.cache`, the images are decoded straight into a file and mapped from there: pages
    come into memory when they are read and leave it when it is short, so a set may be larger than
    the memory. Writing to the result never reaches the file.

    Args:
        files: At least one.
        names: Names that identify the files wherever their folder lies.
        input_size: S.
        resizing: See `Resizing`.
        reading: See `Reading`. Decoded images are kept under a key that changes whenever an image
            file does.

    Raises:
        DataError: Naming the first file that is not a readable image, or saying that none is; or if
            the disk of the cache is too full. A folder that may not be written is a warning.
    """
    shape, found = (len(files), 3, input_size, input_size), None
    try:
        if reading.cache:
            store = _cache_file(files, names, input_size, resizing, reading)
            found = _cached(store, shape, files, resizing, reading)
        if found is None:
            decoded_now = np.empty(shape, dtype=np.uint8)
            found = decoded_now, _decode(decoded_now, files, resizing, reading)
        images, broken = found
        if broken and reading.on_error == "raise":
            raise next(iter(broken.values()))
    except UnreadableError as error:
        if not error.broken:
            raise
        way = "or leave out such files with --data.on_error skip"
        raise UnreadableError(error.file, error.reason, f"{error.cure}, {way}") from error
    if len(broken) == len(files):
        raise DataError(
            f"None of {len(files):,} image files can be read; the first one: {broken[0]}"
        )
    return Decoded(torch.from_numpy(images[: len(files) - len(broken)]), broken)


def cache_home() -> Path:
    """Our part of the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "bdclean"


def is_plain(file: Path) -> bool:
    """Whether two pictures of one size have files of one size."""
    return file.suffix.lower() in _PLAIN


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder of the cache; a warning says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return True
    except OSError as error:
        if error.errno in _FULL:
            return True  # told with what is needed and what is free
        rank_zero_warn(
            f"The cache folder {folder} cannot be written ({error.strerror or error}), so decoded "
            "images are held in memory and decoded again next time. Set the environment variable "
            "XDG_CACHE_HOME to another folder to keep them."
        )
        return False


def _cached(
    store: Path,
    shape: tuple[int, ...],
    files: Sequence[Path],
    resizing: Resizing,
    reading: Reading,
) -> tuple[np.ndarray, dict[int, UnreadableError]] | None:
    """Maps the file of the cache, which is written first where there is none.

    Beside it lies a list of the broken files, where there are any. Rows at the end are empty then.

    Returns:
        The images and the broken files; None where the cache may not be written.
    """
    found = _stored(store, shape, files)
    if found is None and _is_writable(store.parent):
        try:
            _write(store, shape, files, resizing, reading)
        except FileError as error:
            raise DataError(f"{error} Make room, {_WAY_OUT}") from error
        found = _stored(store, shape, files)
    return found


def _stored(
    store: Path, shape: tuple[int, ...], files: Sequence[Path]
) -> tuple[np.ndarray, dict[int, UnreadableError]] | None:
    """What lies in the cache; None if nothing does, or it is damaged and to be written again."""
    beside, broken = store.with_suffix(".json"), {}
    try:
        images = np.lib.format.open_memmap(store, mode="c")
        for row, reason, cure in json.loads(beside.read_text()) if beside.is_file() else ():
            broken[range(len(files)).index(row)] = UnreadableError(files[row], reason, cure)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    whole = images.shape == shape and images.dtype == np.uint8
    return (images, broken) if whole else None


def _cache_file(
    files: Sequence[Path],
    names: Sequence[str],
    input_size: int,
    resizing: Resizing,
    reading: Reading,
) -> Path:
    how = f"{resizing} exif" if reading.exif_orientation else resizing
    digest = hashlib.sha256(f"v2 {input_size} {how}\n".encode())
    for file, name in zip(files, names, strict=True):
        try:
            stat = file.stat()
            plain = file.read_bytes() if is_plain(file) else b""
        except OSError as error:
            raise DataError(f"{file} is listed but cannot be read ({error.strerror}).") from error
        key = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(key.encode(errors="surrogateescape"))  # names need not be UTF-8
        if plain:
            digest.update(hashlib.sha256(plain).digest())
    return cache_home() / "images" / f"{digest.hexdigest()[:32]}.npy"


def _write(
    store: Path, shape: tuple[int, ...], files: Sequence[Path], resizing: Resizing, reading: Reading
) -> None:
    """Decodes into `store`, which exists only when it is complete."""
    with replacing(store) as temporary:
        needed, free = math.prod(shape), shutil.disk_usage(store.parent).free
        if needed > free:  # writing to a mapped file on a full disk would kill the process
            raise DataError(
                f"{len(files):,} decoded images take {needed / 1e9:.1f} GB and {store.parent} has "
                f"{free / 1e9:.1f} GB free; make room, {_WAY_OUT}"
            )
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        broken, beside = _decode(images, files, resizing, reading), store.with_suffix(".json")
        images.flush()
        beside.unlink(missing_ok=True)
        if broken:
            told = [(row, error.reason, error.cure) for row, error in broken.items()]
            write_text(beside, json.dumps(told))


def _decode(
    images: np.ndarray, files: Sequence[Path], resizing: Resizing, reading: Reading
) -> dict[int, UnreadableError]:
    """Fills the first rows of `images`; which files cannot be read, by their positions."""
    found: dict[int, UnreadableError] = {}

    def fill(row: int) -> None:
        try:
            with decoded(files[row], exif_orientation=reading.exif_orientation) as picture:
                ready = _resized(files[row], picture, images.shape[-1], resizing)
                images[row] = np.asarray(ready).transpose(2, 0, 1)
        except UnreadableError as error:
            if reading.on_error == "raise" or not error.broken:
                raise
            found[row] = error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(fill, range(len(files)))
        follow((1 for _ in done), len(files), "decoding images", brief=True)
    broken = dict(sorted(found.items()))  # threads end in any order
    if broken:
        kept = (row for row in range(len(files)) if row not in broken)
        for target, row in enumerate(kept):
            images[target] = images[row]
    return broken


def _resized(file: Path, rgb: Image.Image, size: int, resizing: Resizing) -> Image.Image:
    if resizing == "imagenet":
        shorter = round(size * 256 / 224)
        if shorter**2 * max(rgb.size) > min(rgb.size) * MEMORY // 8:
            raise UnreadableError(file, "it is far longer than wide", "crop or remove it")
        rgb = tv.center_crop(tv.resize(rgb, shorter), [size, size])
    elif resizing == "stretch" and rgb.size != (size, size):
        rgb = tv.resize(rgb, [size, size])
    if rgb.size == (size, size):
        return rgb
    return ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
