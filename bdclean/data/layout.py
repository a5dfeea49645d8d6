"""What the folders of a data set are: its parts, its classes, or neither. Nothing is decoded."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from bdclean.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
# Pictures too, which nobody should miss in silence.
NOT_READ = frozenset(
    {
        *(".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".tga", ".dng", ".apng", ".pbm"),
        *(".pnm", ".ico", ".psd", ".cr2", ".nef", ".arw"),
    }
)

# What systems leave beside files: thumbnails, rubbish, resource forks.
_OF_SYSTEMS = frozenset(
    {
        *("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found"),
        *("system volume information", "__pycache__"),
    }
)
_WORDS = r"(?:images?|imgs?|pictures?|photos?|data|set|split|folder)"
_PARTS = {
    part: re.compile(rf"(?:{_WORDS}[ _.-]?)?(?:{names})(?:[ _.-]?{_WORDS})?", re.IGNORECASE)
    for part, names in {
        "train": "train|training",
        "test": "test|testing|tests",
        "val": "val|valid|validation|dev",
    }.items()
}
_FEW = 5  # names in a sentence


@dataclass(frozen=True)
class Layout:
    """The folders above the class folders.

    Attributes:
        train: Of the training images.
        test: Of the test images; None where there is none.
        val: Another part beside them, which is not read; None where there is none.
        flat: Whether `train` is the folder of the data set itself.
    """

    train: Path
    test: Path | None = None
    val: Path | None = None
    flat: bool = False


def find_layout(root: Path, *, strict: bool = False) -> Layout:
    """Finds the parts of a data set, however spelled (`train`, `Training`, `train_images`).

    Without a folder of training images, `root` itself holds the class folders.

    Args:
        root: The folder of the data set.
        strict: Refuse other folders with images beside `train` even where there are test images,
            which tell that `train` is no class.

    Raises:
        DataError: If there is no such folder, or it is not clear which one holds the training
            images.
    """
    if not root.is_dir():
        raise DataError(
            f"root={root}: there is no such folder; give one that holds train/CLASS/IMAGE.jpg and "
            "test/CLASS/IMAGE.jpg, or the class folders themselves."
        )
    names = folders_in(root)
    train, test = _part(root, names, "train"), _part(root, names, "test")
    val = next((root / name for name in names if part_of(name) == "val"), None)
    if train is None:
        for other in (test, val):
            if other is not None and _is_above(other):
                raise DataError(
                    f"{root} holds {other.name}/ and no folder of training images; name that one "
                    "train, or give the folder above the class folders."
                )
        return Layout(root, flat=True)
    parts = {part.name for part in (train, test, val) if part is not None}
    beside = [name for name in names if name not in parts and not name.startswith("test_")]
    others = [name for name in beside if has_images(root / name)]
    if others and (strict or (test is None and val is None)):
        raise DataError(
            f"{root} holds {train.name}/ beside other folders with images ({_listed(others)}). If "
            f"the classes are in it, give {train}; if it is a class itself, rename it."
        )
    if others:
        rank_zero_warn(
            f"{root} holds {train.name}/ beside other folders with images ({_listed(others)}), "
            "which are not read."
        )
    if val is not None and test is None:
        rank_zero_warn(
            f"{root} holds {val.name}/ and no folder of test images. {val.name}/ is not read; to "
            "measure on it, name it test."
        )
    return Layout(train, test, val)


def part_of(name: str) -> str | None:
    """Which part of a data set a folder of this name is: `train`, `test`, `val` or none."""
    return next((part for part, form in _PARTS.items() if form.fullmatch(name)), None)


def class_folders(root: Path) -> list[str]:
    """Names of the class folders below `root`, sorted as torchvision's ImageFolder does.

    Hidden folders and what systems leave (`__MACOSX`, `@eaDir`) are no classes.

    Raises:
        DataError: If the folder is missing, holds no class folder, or holds folders of folders.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}. Expected {root}/CLASS/IMAGE.jpg, one folder a class.")
    names = folders_in(root)
    if not names:
        raise DataError(
            f"{root} holds no class folders. Expected {root}/CLASS/IMAGE.jpg; images without "
            "classes can only serve as defense_root."
        )
    for name in names:
        if _is_above(root / name):
            inner = [each for each in folders_in(root / name) if has_images(root / name / each)]
            raise DataError(
                f"{root / name} is no class: it holds folders of images ({_listed(inner)}) and no "
                f"image of its own. If these are the classes or the parts, give {root / name}; if "
                "they are one class, put their images into one folder."
            )
    return names


def empty_classes(root: Path, classes: Iterable[str]) -> list[str]:
    """Those of the class folders below `root` that hold no image."""
    return [name for name in classes if not has_images(root / name)]


def require_images(root: Path, classes: Iterable[str], more: str = "") -> None:
    """Checks that every class folder below `root` has an image.

    Args:
        root: The folder above them.
        classes: Their names.
        more: Another way out, at the end of the message.

    Raises:
        DataError: Naming the first one without.
    """
    for name in empty_classes(root, classes):
        other = next(walk(root / name, NOT_READ), None)
        none = "no images" if other is None else f"pictures that are not read ({other.name})"
        put = "put images in" if other is None else f"convert them ({', '.join(sorted(SUFFIXES))})"
        raise DataError(
            f"{root / name} holds {none}; {put}, or remove the folder if it is no class{more}."
        )


def require_one_part(root: Path) -> None:
    """Checks that a folder of photos is not a whole data set, test images among them.

    Raises:
        DataError: If it holds training images beside others.
    """
    names = [name for name in folders_in(root) if part_of(name) and has_images(root / name)]
    train = [name for name in names if part_of(name) == "train"]
    if train and len(names) > len(train):
        raise DataError(
            f"defense_root={root}: it holds the parts of a data set ({_listed(names)}), and a "
            f"defender must not see test images; give one of them, such as {root / train[0]}."
        )


def warn_of_pictures_beside(root: Path) -> None:
    """Tells of pictures that lie beside the class folders, and are in no class."""
    found = _own_pictures(root)
    if found:
        rank_zero_warn(
            f"{root} holds pictures beside the class folders, which are left out: {found[0]} "
            f"({len(found):,} in all). Move them into a class folder to have them used."
        )


# ---------------------------------------------------------------------- walking


def folders_in(root: Path) -> list[str]:
    """Names of the folders below `root`, sorted, without those of nobody's images."""
    return sorted(e.name for e in _entries(root) if e.is_dir() and _is_of_people(e.name))


def image_files(folder: Path) -> list[Path]:
    """The image files below `folder`, at any depth, sorted; hidden ones are skipped.

    Linked folders are entered, as torchvision's ImageFolder does.
    """
    return sorted(walk(folder))


def has_images(folder: Path) -> bool:
    """Whether there is an image file below `folder`, at any depth."""
    return next(walk(folder), None) is not None


def walk(folder: Path, suffixes: frozenset[str] = SUFFIXES) -> Iterator[Path]:
    """The files with these endings below `folder`, in any order.

    Raises:
        DataError: If a folder cannot be read.
    """
    for top, inner, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here = Path(top)
        inner[:] = [n for n in inner if _is_of_people(n) and not _turns_back(here / n)]
        for name in names:
            path = here / name
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(error) from error


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class that the test images lack
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    why = error.strerror or str(error)
    return DataError(f"{error.filename} cannot be read ({why}); see that its folders may be read.")


def _is_of_people(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def _is_above(folder: Path) -> bool:
    """Whether it holds no image of its own, but folders of images.

    A single folder in a class folder (`WNID/images`) makes no level of its own, unless it has the
    name of a part.
    """
    if _own_pictures(folder):
        return False
    inner = [name for name in folders_in(folder) if has_images(folder / name)]
    return len(inner) > 1 or any(part_of(name) for name in inner)


def _own_pictures(folder: Path) -> list[str]:
    """Names of the image files in `folder` itself, sorted."""
    files = [e.name for e in _entries(folder) if not e.name.startswith(".") and e.is_file()]
    return sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES)


def _turns_back(folder: Path) -> bool:
    """Whether it is a link to a folder on the way to it."""
    if not folder.is_symlink():
        return False
    target, above = folder.resolve(), folder.absolute().parents
    return any(place.resolve().is_relative_to(target) for place in above)


def _part(root: Path, names: Iterable[str], part: str) -> Path | None:
    found = [name for name in names if part_of(name) == part]
    if part in found:
        return root / part
    if len(found) > 1:
        raise DataError(
            f"{root} holds {_listed(found)}, and any of them may be the {part} images; name the "
            f"one that is meant {part}."
        )
    return root / found[0] if found else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (" ..." if len(names) > _FEW else "")
