"""From the layout of a data set on disk to images with their labels."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bdclean.data.decoding import Resizing, load_images
from bdclean.data.images import ImageSet
from bdclean.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
# Pictures too, which nobody should miss in silence.
_NOT_READ = frozenset({".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".tga", ".dng"})


def class_folders(root: Path) -> list[str]:
    """Names of the class folders below `root`, sorted as torchvision's ImageFolder does.

    Hidden folders (`.ipynb_checkpoints`) are no classes.

    Raises:
        DataError: If the folder is missing or holds no class folder.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}. Expected {root}/CLASS/IMAGE.jpg, one folder a class.")
    names = sorted(e.name for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(
            f"{root} holds no class folders. Expected {root}/CLASS/IMAGE.jpg; images without "
            "classes can only serve as defense_root."
        )
    return names


def require_images(root: Path, classes: Iterable[str]) -> None:
    """Checks that every class folder below `root` has an image.

    Raises:
        DataError: Naming the first one without.
    """
    for name in classes:
        if next(_images(root / name), None) is None:
            raise DataError(
                f"{root / name} holds no images; put images in, or remove the folder if it is no "
                "class."
            )


def read_class_folder(
    root: Path,
    input_size: int,
    *,
    classes: Sequence[str] | None = None,
    resizing: Resizing = "fill",
    cache: bool = True,
) -> ImageSet:
    """Reads `root/CLASS/IMAGE`, at any depth below CLASS.

    Args:
        root: The folder above the class folders.
        input_size: Side of the images in pixels.
        classes: Their folders in the order of the labels; None takes all there are, sorted.
        resizing: See `bdclean.data.decoding.Resizing`.
        cache: Keep the decoded images.

    Raises:
        DataError: If the folder, or one of `classes`, has no images, or one cannot be decoded.
    """
    chosen = class_folders(root) if classes is None else classes
    files = _listed(root, chosen)
    if classes is not None and [] in files:
        raise DataError(f"{root / classes[files.index([])]} holds no images; copy it again.")
    labels = torch.cat([torch.full((len(f),), k) for k, f in enumerate(files)])
    everything = [file for of_class in files for file in of_class]
    found = read_files(root, everything, labels, input_size, resizing=resizing, cache=cache)
    return replace(found, classes=tuple(chosen))


def read_flat_folder(root: Path, input_size: int, *, cache: bool = True) -> ImageSet:
    """Reads every image below `root`, at any depth, without labels.

    Raises:
        DataError: If the folder is missing, has no images, or one cannot be decoded.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}. Give a folder of images.")
    return read_files(root, _listed(root, ["."])[0], None, input_size, cache=cache)


def read_files(
    root: Path,
    files: Sequence[Path],
    labels: Tensor | None,
    input_size: int,
    *,
    resizing: Resizing = "fill",
    cache: bool = True,
) -> ImageSet:
    """Reads the given files below `root`, in their order; `labels` is (N,) or None.

    Raises:
        DataError: If there are none, or one is missing or cannot be decoded.
    """
    if not files:
        raise DataError(f"No images below {root}. Known endings: {', '.join(sorted(SUFFIXES))}.")
    names = tuple(file.relative_to(root).as_posix() for file in files)
    images = load_images(files, names, input_size, resizing=resizing, cache=cache)
    return ImageSet(images, labels, names, root=root)


def image_files(folder: Path) -> list[Path]:
    """The image files below `folder`, at any depth, sorted; hidden ones are skipped.

    Linked folders are entered, as torchvision's ImageFolder does.
    """
    return sorted(_images(folder))


def _images(folder: Path, suffixes: frozenset[str] = SUFFIXES) -> Iterator[Path]:
    for top, inner, names in os.walk(folder, followlinks=True):
        here = Path(top)
        inner[:] = [n for n in inner if not n.startswith(".") and not _turns_back(here / n)]
        for name in names:
            path = here / name
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                yield path


def _turns_back(folder: Path) -> bool:
    """Whether it is a link to a folder on the way to it."""
    if not folder.is_symlink():
        return False
    target, above = folder.resolve(), folder.absolute().parents
    return any(place.resolve().is_relative_to(target) for place in above)


def _listed(root: Path, folders: Iterable[str]) -> list[list[Path]]:
    """The `image_files` of each folder; a warning counts the pictures that are not read."""
    found = [sorted(_images(root / name, SUFFIXES | _NOT_READ)) for name in folders]
    others = [path for files in found for path in files if path.suffix.lower() in _NOT_READ]
    if others:
        rank_zero_warn(
            f"{len(others):,} pictures below {root} are left out, {others[0].name} for one: their "
            f"format is not read. Convert them ({', '.join(sorted(SUFFIXES))}) to have them used."
        )
    return [[path for path in files if path.suffix.lower() in SUFFIXES] for files in found]


# ---------------------------------------------------------------- data sets with a known layout


def require_layout(
    paths: Iterable[Path], *, name: str, root: str, tree: str, downloads: bool = True
) -> None:
    """Checks that the parts of a data set are there.

    Args:
        paths: Files and folders that must exist.
        name: The data set's usual name.
        root: Its argument `root`.
        tree: What is expected, `{root}` standing for `root`.
        downloads: Whether the data module can fetch it.

    Raises:
        DataError: Naming the first missing path, the keys to change, and the tree.
    """
    for path in paths:
        if not path.exists():
            way = "or set download to true" if downloads else "and bring the data there"
            raise DataError(
                f"root={root}: {name} is not complete, {path} is missing. Give the folder that "
                f"holds this tree, {way}:\n{tree.format(root=root)}"
            )


@contextmanager
def downloading(name: str, root: str, tree: str) -> Iterator[None]:
    """Turns a failed download into a message with the tree to bring by hand.

    Raises:
        DataError: If the network, the disk or the checksum of the archive fails.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"download=true: {name} could not be fetched into {root} ({error}); try again, or "
            f"bring it by hand as\n{tree.format(root=root)}"
        ) from error
