"""Image files to uint8 arrays, decoded once into a memory-mapped file of the user's cache."""

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tv

from bdclean.errors import DataError, FileError
from bdclean.files import replacing
from bdclean.progress import follow

Resizing = Literal["fill", "stretch", "imagenet"]
"""How a picture of another size becomes a square of side S.

`fill`: the centre square, resized (bicubic). `stretch`: both sides to S, whatever the proportions
(bilinear). `imagenet`: the shorter side to S * 256 / 224 (bilinear), then the centre; always, as in
the usual test pipeline.
"""

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises on files that are damaged or made to do harm."""

# Formats in which two pictures of one size have files of one size: unpacked with equal dates, a
# clean and a poisoned copy of a data set would have one key.
_PLAIN = frozenset({".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
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
    cache: bool = True,
) -> Tensor:
    """Decodes image files, or maps what an earlier call has decoded.

    With `cache`, the images are decoded straight into a file and mapped from there: pages come
    into memory when they are read and leave it when it is short, so a set may be larger than the
    memory. Writing to the result never reaches the file.

    Args:
        files: At least one.
        names: Names that identify the files wherever their folder lies.
        input_size: S.
        resizing: See `Resizing`.
        cache: Keep the decoded images, under a key that changes whenever an image file does.

    Returns:
        (N, 3, S, S), uint8, in the order of `files`.

    Raises:
        DataError: Naming the first file that is not a readable image; or if the cache cannot be
            written, because the disk is too full or the folder is protected.
    """
    shape = (len(files), 3, input_size, input_size)
    if not cache:
        images = np.empty(shape, dtype=np.uint8)
        _decode(images, files, resizing)
        return torch.from_numpy(images)
    store = _cache_file(files, names, input_size, resizing)
    if not store.is_file():
        try:
            _write(store, shape, files, resizing)
        except FileError as error:
            raise DataError(f"{error} Make room, {_WAY_OUT}") from error
    return torch.from_numpy(np.load(store, mmap_mode="c"))


def cache_home() -> Path:
    """Our part of the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "bdclean"


def is_plain(file: Path) -> bool:
    """Whether two pictures of one size have files of one size."""
    return file.suffix.lower() in _PLAIN


def _cache_file(
    files: Sequence[Path], names: Sequence[str], input_size: int, resizing: Resizing
) -> Path:
    digest = hashlib.sha256(f"v2 {input_size} {resizing}\n".encode())
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


def _write(store: Path, shape: tuple[int, ...], files: Sequence[Path], resizing: Resizing) -> None:
    """Decodes into `store`, which exists only when it is complete."""
    with replacing(store) as temporary:
        needed, free = math.prod(shape), shutil.disk_usage(store.parent).free
        if needed > free:  # writing to a mapped file on a full disk would kill the process
            raise DataError(
                f"{len(files):,} decoded images take {needed / 1e9:.1f} GB and {store.parent} has "
                f"{free / 1e9:.1f} GB free; make room, {_WAY_OUT}"
            )
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _decode(images, files, resizing)
        images.flush()


def _decode(images: np.ndarray, files: Sequence[Path], resizing: Resizing) -> None:
    def fill(row: int) -> None:
        picture = _decode_one(files[row], images.shape[-1], resizing)
        images[row] = np.asarray(picture).transpose(2, 0, 1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(fill, range(len(files)))
        follow((1 for _ in done), len(files), "decoding images", brief=True)


def _decode_one(file: Path, size: int, resizing: Resizing) -> Image.Image:
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":  # conversion clips at 255
                raise DataError(
                    f"{file} has more than 8 bits a pixel (mode {picture.mode}); convert it to 8 "
                    "bits."
                )
            rgb = picture.convert("RGB")
    except UNREADABLE as error:
        raise DataError(
            f"{file} is not a readable image ({error}); repair or remove it."
        ) from error
    if resizing == "imagenet":
        rgb = tv.center_crop(tv.resize(rgb, round(size * 256 / 224)), [size, size])
    elif rgb.size != (size, size):
        if resizing == "stretch":
            rgb = tv.resize(rgb, [size, size])
        else:
            rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return rgb
