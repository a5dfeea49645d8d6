"""Reading real images from disk into memory."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdclean.data.images import ImageSet
from bdclean.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def class_folders(root: Path) -> list[str]:
    """Names of the class folders below `root`, sorted as torchvision's ImageFolder does.

    Raises:
        DataError: If the folder is missing or holds no class folder.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}. Expected {root}/CLASS/IMAGE.jpg, one folder a class.")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not names:
        raise DataError(
            f"{root} holds no class folders. Expected {root}/CLASS/IMAGE.jpg; images without "
            "classes can only serve as data.init_args.defense_root."
        )
    return names


def read_class_folder(root: Path, input_size: int, *, cache: bool = True) -> ImageSet:
    """Reads `root/CLASS/IMAGE` into memory, classes numbered in sorted order.

    Raises:
        DataError: If the folder has no images, or one cannot be decoded.
    """
    classes = class_folders(root)
    files = [_image_files(root / name) for name in classes]
    labels = torch.cat([torch.full((len(f),), k) for k, f in enumerate(files)])
    everything = [file for of_class in files for file in of_class]
    return _read(root, everything, labels, input_size, cache)


def read_flat_folder(root: Path, input_size: int, *, cache: bool = True) -> ImageSet:
    """Reads every image below `root`, at any depth, without labels.

    Raises:
        DataError: If the folder is missing, has no images, or one cannot be decoded.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}. Give a folder of images.")
    return _read(root, _image_files(root), None, input_size, cache)


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _read(
    root: Path, files: Sequence[Path], labels: Tensor | None, input_size: int, cache: bool
) -> ImageSet:
    if not files:
        raise DataError(f"No images below {root}. Known endings: {', '.join(sorted(SUFFIXES))}.")
    names = tuple(file.relative_to(root).as_posix() for file in files)
    store = _cache_file(files, names, input_size) if cache else None
    if store is not None and store.is_file():
        return ImageSet(load_file(store)["images"], labels, names)
    images = decode(files, input_size)
    if store is not None:
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".{os.getpid()}")
        save_file({"images": images}, temporary)
        temporary.replace(store)
    return ImageSet(images, labels, names)


def cache_home() -> Path:
    """Our part of the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "bdclean"


def _cache_file(files: Sequence[Path], names: Sequence[str], input_size: int) -> Path:
    """A file under the user's cache folder that changes whenever an image file does."""
    digest = hashlib.sha256(f"v1 {input_size}".encode())
    for file, name in zip(files, names, strict=True):
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return cache_home() / "images" / f"{digest.hexdigest()[:32]}.safetensors"


def decode(files: Sequence[Path], input_size: int) -> Tensor:
    """Decodes image files to (N, 3, S, S) uint8; others sizes are cropped to the centre square.

    Raises:
        DataError: Naming the first file that is not a readable image.
    """
    images = np.empty((len(files), input_size, input_size, 3), dtype=np.uint8)

    def fill(row: int) -> None:
        images[row] = _decode_one(files[row], input_size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(len(files)), chunksize=256):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _decode_one(file: Path, input_size: int) -> np.ndarray:
    size = (input_size, input_size)
    try:
        with Image.open(file) as picture:
            rgb = picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(
            f"{file} is not a readable image ({error}); repair or remove it."
        ) from error
    if rgb.size != size:
        rgb = ImageOps.fit(rgb, size, Image.Resampling.BICUBIC)
    return np.asarray(rgb)
