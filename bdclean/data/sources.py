"""From the layout of a data set on disk to images with their labels."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bdclean.data.decoding import Decoded, Reading, Resizing, load_images
from bdclean.data.images import ImageSet, labels_of
from bdclean.data.layout import (
    NOT_READ,
    SUFFIXES,
    class_folders,
    require_one_part,
    walk,
    warn_of_pictures_beside,
)
from bdclean.errors import DataError


def read_class_folder(
    root: Path,
    input_size: int,
    *,
    classes: Sequence[str] | None = None,
    sparse: bool = False,
    resizing: Resizing = "fill",
    reading: Reading = Reading(),  # noqa: B008  (frozen)
) -> ImageSet:
    """Reads `root/CLASS/IMAGE`, at any depth below CLASS.

    Args:
        root: The folder above the class folders.
        input_size: Side of the images in pixels.
        classes: Their folders in the order of the labels; None takes all there are, sorted.
        sparse: Whether some of `classes` may have no images, or no folder.
        resizing: See `bdclean.data.decoding.Resizing`.
        reading: See `bdclean.data.decoding.Reading`.

    Raises:
        DataError: If the folder, or one of `classes`, has no images, or one cannot be decoded; or
            if no image of a class can.
    """
    chosen = class_folders(root) if classes is None else classes
    files = _listed(root, chosen)
    warn_of_pictures_beside(root)
    if classes is not None and not sparse and [] in files:
        raise DataError(f"{root / classes[files.index([])]} holds no images; copy it again.")
    labels = torch.cat([torch.full((len(f),), k) for k, f in enumerate(files)])
    everything = [file for of_class in files for file in of_class]
    found = read_files(root, everything, labels, input_size, resizing=resizing, reading=reading)
    left = set(labels_of(found).tolist())
    for k, of_class in enumerate(files):
        if of_class and k not in left:
            raise DataError(
                f"None of the {len(of_class):,} images in {root / chosen[k]} can be read; repair "
                "them, or remove the folder."
            )
    return replace(found, classes=tuple(chosen))


def read_flat_folder(
    root: Path,
    input_size: int,
    *,
    reading: Reading = Reading(),  # noqa: B008  (frozen)
) -> ImageSet:
    """Reads every image below `root`, at any depth, without labels.

    Raises:
        DataError: If the folder is missing, has no images, or one cannot be decoded; or if it is a
            whole data set, with test images.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}. Give a folder of images.")
    require_one_part(root)
    return read_files(root, _listed(root, ["."])[0], None, input_size, reading=reading)


def read_files(
    root: Path,
    files: Sequence[Path],
    labels: Tensor | None,
    input_size: int,
    *,
    resizing: Resizing = "fill",
    reading: Reading = Reading(),  # noqa: B008  (frozen)
) -> ImageSet:
    """Reads the given files below `root`, in their order; `labels` is (N,) or None.

    A warning counts the broken ones that `reading` lets be skipped.

    Raises:
        DataError: If there are none, or one is missing or cannot be decoded.
    """
    if not files:
        raise DataError(f"No images below {root}. Known endings: {', '.join(sorted(SUFFIXES))}.")
    names = tuple(file.relative_to(root).as_posix() for file in files)
    found = load_images(files, names, input_size, resizing=resizing, reading=reading)
    if not found.broken:
        return ImageSet(found.images, labels, names, root=root)
    _warn_of_broken(root, names, found)
    kept = [row for row in range(len(files)) if row not in found.broken]
    return ImageSet(
        found.images,
        None if labels is None else labels[kept],
        tuple(names[row] for row in kept),
        root=root,
        skipped=tuple(names[row] for row in found.broken),
    )


def _warn_of_broken(root: Path, names: Sequence[str], found: Decoded) -> None:
    row, error = next(iter(found.broken.items()))
    count, total = len(found.broken), len(names)
    rank_zero_warn(
        f"{count:,} of {total:,} image files below {root} cannot be read and "
        f"{'is' if count == 1 else 'are'} left out, {names[row]} for one ({error.reason}). "
        "result.json names the first ones."
    )


def _listed(root: Path, folders: Iterable[str]) -> list[list[Path]]:
    """The `image_files` of each folder; a warning counts the pictures that are not read."""
    found = [sorted(walk(root / name, SUFFIXES | NOT_READ)) for name in folders]
    others = [path for files in found for path in files if path.suffix.lower() in NOT_READ]
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
