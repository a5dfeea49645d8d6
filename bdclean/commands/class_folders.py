"""What a user's folder of labelled images holds, before anything is trained on it."""

import statistics
from pathlib import Path

from PIL import Image

from bdclean.data.decoding import UNREADABLE
from bdclean.data.sources import class_folders, image_files, require_images
from bdclean.errors import DataError

_SIZES = (32, 64, 128, 224)
_LOOK_AT = 50  # files whose size is looked at
_PARTS = ("train", "test", "val")  # of no class folder; and test_*, from `attack export`


def training_folder(folder: Path) -> Path:
    """The folder above the class folders: `folder`, or `train` in it.

    Raises:
        DataError: If there is none, or it is not clear which one it is.
    """
    if not folder.is_dir():
        raise DataError(f"FOLDER {folder} is no folder; give one that holds CLASS/IMAGE.jpg.")
    inner = folder / "train"
    if not inner.is_dir():
        return folder
    beside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    beside = [n for n in beside if n not in _PARTS and not n.startswith((".", "test_"))]
    others = [n for n in beside if image_files(folder / n)]
    if others:
        raise DataError(
            f"{folder} holds train/ beside other folders with images ({', '.join(others[:3])}). "
            f"If the classes are in it, give {inner}; if it is a class itself, rename it."
        )
    return inner


def classes_of(source: Path) -> list[str]:
    """The class folders; there are two at least, each with images.

    Raises:
        DataError: If there are fewer, or one is empty.
    """
    if not any(entry.is_dir() and not entry.name.startswith(".") for entry in source.iterdir()):
        raise DataError(
            f"{source} holds no class folders; sort the images into {source}/CLASS/IMAGE.jpg, one "
            "folder for each class."
        )
    names = class_folders(source)
    if len(names) < 2:
        raise DataError(
            f"{source} holds the single class {names[0]}; at least two class folders are needed."
        )
    require_images(source, names)
    return names


def count_images(folder: Path) -> int:
    """The images in the class folders.

    Args:
        folder: The folder above the class folders.
    """
    return sum(len(image_files(folder / name)) for name in class_folders(folder))


def image_size(folder: Path) -> int:
    """The usual side nearest to the images': 32, 64, 128 or 224.

    Args:
        folder: The folder above the class folders.

    Raises:
        DataError: If there are no images.
    """
    files = [file for name in class_folders(folder) for file in image_files(folder / name)]
    if not files:
        raise DataError(f"{folder} holds no images; expected {folder}/CLASS/IMAGE.jpg.")
    sides = []
    for file in files[:: max(1, len(files) // _LOOK_AT)]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except UNREADABLE as error:
            raise DataError(f"{file} cannot be read as an image; remove or replace it.") from error
    middle = statistics.median(sides)
    return min(_SIZES, key=lambda size: abs(size - middle))
