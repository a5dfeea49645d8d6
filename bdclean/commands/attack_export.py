"""The poisoned training set as image files, so that other tools can train on it.

OUT/train/CLASS/NUMBER.png           CLASS is the label *seen*; uint8 values are exact
OUT/test/CLASS/NUMBER.png            clean test images
OUT/test_triggered/CLASS/NUMBER.png  those of them that count for the ASR, with the trigger;
                                     CLASS is the true label, NUMBER as in test/
OUT/rows.csv, plan.json, plan.safetensors, trigger.safetensors      the ground truth
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from bdclean.attacks import PoisonPlan
from bdclean.data import ImageDataModule, RoleImages
from bdclean.data.images import labels_of
from bdclean.errors import ConfigError, FileError
from bdclean.files import write_text
from bdclean.functional.seeds import derive_seed
from bdclean.progress import follow
from bdclean.tabular import csv_text

COLUMNS = ("file", "row", "base_row", "source", "label_true", "label_seen", "poison", "cover")
_CHUNK = 256  # images per task of a thread


@dataclass(frozen=True)
class Part:
    """The images of one folder below OUT.

    Attributes:
        folder: Its name.
        images: N rows.
        files: Path below OUT of each row, N of them.
    """

    folder: str
    images: RoleImages
    files: tuple[str, ...]


def export(data: ImageDataModule, out: str | Path, *, test: bool = True) -> None:
    """Writes the poisoned training set and all test sets of the attack as PNG files.

    The folder appears whole or not at all.

    Args:
        data: The data set with its attack.
        out: The folder to make; it must not exist, or be empty.
        test: Write the test sets as well.

    Raises:
        ConfigError: There is no attack or it has no fixed set of poisoned images; or the folder
            holds something already, or cannot be written.
    """
    out = Path(out)
    _require_free(out)
    plan = _plan(data)
    classes = class_names(data)
    tests = _tests(data, classes) if test else []  # first: training rows may take long to make
    parts = [_train(data, classes), *tests]
    rows = _rows(data, plan, parts[0].files)
    try:
        target = out.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            folder = Path(beside) / target.name
            folder.mkdir()
            for part in parts:
                _write_images(folder, part, classes)
            write_text(folder / "rows.csv", csv_text([COLUMNS, *rows]))
            data.save_artifacts(folder)
            folder.replace(target)
    except FileError as error:
        raise ConfigError(f"--out={out}: the folder cannot be written ({error}).") from error
    except OSError as error:
        raise ConfigError(
            f"--out={out}: the folder cannot be written ({error.strerror or error})."
        ) from error


def class_names(data: ImageDataModule) -> list[str]:
    """One folder name per class, in an order that sorting keeps.

    These are the names of the class folders that the images came from, else the zero-padded
    numbers of the classes.
    """
    labels, files = labels_of(data.stored).tolist(), map(PurePosixPath, data.stored.files)
    pairs = zip(labels, files, strict=False)  # no files where the images are from an archive
    found = sorted({(label, file.parts[0]) for label, file in pairs if len(file.parts) > 1})
    names = [name for _, name in found]
    every_class_once = [label for label, _ in found] == list(range(data.num_classes))
    if every_class_once and names == sorted(set(names)):
        return names
    width = len(str(data.num_classes - 1))
    return [f"{k:0{width}}" for k in range(data.num_classes)]


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"--out={out}: this exists already and is never overwritten; name a new folder, or "
            "remove the old one."
        )


def _plan(data: ImageDataModule) -> PoisonPlan:
    """The plan, which reads the training set."""
    if data.attack is None:
        raise ConfigError(
            "data.init_args.attack is null, so that there is nothing to export; give an attack "
            "with -c after the data (`bdclean config ls attack` lists them)."
        )
    if data.attack.dynamic:
        raise ConfigError(
            f"data.init_args.attack {type(data.attack).__name__} poisons every batch anew and "
            "has no fixed set of images to export; take its static form (WaNet: mode static; "
            "InputAware: trigger, the file of a learned one)."
        )
    if data.attack.poison_augmentation != "none":
        rank_zero_warn(
            f"{type(data.attack).__name__} with apply_to poison transforms its poisoned images "
            "anew in every batch; the files show them before that."
        )
    data.prepare_data()
    if data.plan is None:
        raise ConfigError("There are no training images to poison; set data.init_args.root.")
    return data.plan


# ---------------------------------------------------------------------- what is written


def _train(data: ImageDataModule, classes: Sequence[str]) -> Part:
    """The training role, its files numbered at random.

    Numbers in the order of the rows would give the poisoned images away wherever the data set is
    sorted by class: an image whose number is far from those of its class was labelled anew. The
    draw depends on the split alone, so that a row has the same number under every attack.
    """
    images = data.role_images("train", labels=True)
    seed = derive_seed("export", data.splits.seed)
    numbers = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    files = _files("train", images.columns["label"], numbers, len(images), classes)
    return Part("train", images, files)


def _tests(data: ImageDataModule, classes: Sequence[str]) -> list[Part]:
    """What the loaders of the evaluation show, numbered by row of the test set."""
    sets = [cast(RoleImages, loader.dataset) for loader in data.test_dataloader()]
    folders = ["test", *(f"test_{name}" for name in ("triggered", *data.further_tests))]
    return [
        Part(name, s, _files(name, s.columns["label"], s.rows, len(sets[0]), classes))
        for name, s in zip(folders, sets, strict=True)
    ]


def _files(
    folder: str, labels: Tensor, numbers: Tensor, total: int, classes: Sequence[str]
) -> tuple[str, ...]:
    width = len(str(total - 1))
    pairs = zip(labels.tolist(), numbers.tolist(), strict=True)
    return tuple(f"{folder}/{classes[k]}/{number:0{width}}.png" for k, number in pairs)


def _rows(
    data: ImageDataModule, plan: PoisonPlan, files: Sequence[str]
) -> list[tuple[str | int, ...]]:
    """One line of rows.csv per row of the training role, in the role's order."""
    sources = data.stored.files or ("",) * len(data.stored)
    poison, cover = set(plan.poison_index.tolist()), set(plan.cover_index.tolist())
    true, seen = plan.labels_true.tolist(), plan.labels_seen.tolist()
    return [
        (files[i], i, b, sources[b], true[i], seen[i], int(i in poison), int(i in cover))
        for i, b in enumerate(data.rows.train.tolist())
    ]


# ---------------------------------------------------------------------- writing


def _write_images(out: Path, part: Part, classes: Sequence[str]) -> None:
    """Writes the files in the order of their numbers, so that their dates tell nothing either."""
    for name in classes:  # one without images keeps its folder, and the next ones their number
        (out / part.folder / name).mkdir(parents=True)
    order = sorted(range(len(part.files)), key=lambda row: part.files[row].rpartition("/")[2])
    chunks = [order[start : start + _CHUNK] for start in range(0, len(order), _CHUNK)]

    def write(rows: list[int]) -> int:
        pixels = part.images.shown(rows).permute(0, 2, 3, 1).contiguous().numpy()
        for row, image in zip(rows, pixels, strict=True):
            buffer = BytesIO()  # one write per file
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)
            (out / part.files[row]).write_bytes(buffer.getbuffer())
        return len(rows)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        follow(pool.map(write, chunks), len(order), part.folder)
