"""What a user's folder of labelled images holds, before anything is trained on it."""

import statistics
from pathlib import Path

from bdclean.data.layout import (
    class_folders,
    find_layout,
    folders_in,
    image_files,
    require_images,
)
from bdclean.errors import DataError
from bdclean.pictures import UnreadableError, size_of

_SIZES = (32, 64, 128, 224)
_LOOK_AT = 50  # files whose size is looked at


def training_folder(folder: Path) -> Path:
    """The folder above the class folders: `folder`, or that of the training images in it.

    Raises:
        DataError: If there is none, or it is not clear which one it is.
    """
    if not folder.is_dir():
        raise DataError(f"FOLDER {folder} is no folder; give one that holds CLASS/IMAGE.jpg.")
    return find_layout(folder, strict=True).train


def classes_of(source: Path) -> list[str]:
    """The class folders; there are two at least, each with images.

    Raises:
        DataError: If there are fewer, or one is empty.
    """
    if not folders_in(source):
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
    sides, broken = [], None
    for file in files[:: max(1, len(files) // _LOOK_AT)]:
        try:
            sides.append(min(size_of(file)))
        except UnreadableError as error:  # told, or left out, where the images are decoded
            broken = error
    if broken is not None and not sides:
        raise broken
    middle = statistics.median(sides)
    return min(_SIZES, key=lambda size: abs(size - middle))
