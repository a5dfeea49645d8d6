"""`bdclean sift FOLDER`: which images of a labelled folder are poisoned, and a model without them.

A thin front for `bdclean fit` with AdvrBD. The user's files are read, never moved or changed.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from bdclean.data import ImageFolder
from bdclean.data.sources import SUFFIXES
from bdclean.errors import ConfigError, DataError
from bdclean.purification import AdvrBD
from bdclean.types import Findings, TrainingSet

Fit = Callable[[list[str]], tuple[AdvrBD, ImageFolder]]
"""Runs `bdclean fit` with these words and returns model and data."""

_SIZES = (32, 64, 128, 224)
_LOOK_AT = 50  # files whose size is looked at
_SHORT = {
    "recipe.epochs": "8",
    "recipe.nesterov": "true",
    "recipe.schedule": "onecycle",
    "pgd_steps": "5",
    "step_size": "0.5",
    "rounds": "8",
}  # configs/purify/advrbd_fast.yaml; a test compares them


def make_parser() -> argparse.ArgumentParser:
    """The command's own options; all others are those of `bdclean fit`."""
    parser = argparse.ArgumentParser(
        prog="bdclean sift",
        description="Finds poisoned images in FOLDER/CLASS/* (or FOLDER/train/CLASS/*) with "
        "AdvrBD, and trains a model without them. Writes suspects.csv, a picture sheet and "
        "model.safetensors into OUT. FOLDER stays as it is.",
        epilog="Other words go to `bdclean fit`: --model.arch resnet34, --model.width 16, "
        "--trainer.accelerator gpu, --trainer.precision 32-true, --data.allow_flip false ...",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="One folder for each class.")
    parser.add_argument("--out", type=Path, default=Path("runs/sift"), help="Run folder.")
    parser.add_argument("--size", type=int, help="Side of the images; taken from them if left out.")
    parser.add_argument("--fast", action="store_true", help="8 epochs instead of 100.")
    parser.add_argument("--dry-run", action="store_true", help="Score only; flag nothing.")
    parser.add_argument("--copy-clean", type=Path, metavar="DIR", help="Copy what is kept to DIR.")
    return parser


def run_sift(args: Sequence[str], fit: Fit) -> None:
    """The command.

    Args:
        args: The words after `bdclean sift`.
        fit: Runs the training.

    Raises:
        ConfigError: If the options contradict each other, or DIR is in the way.
        DataError: If FOLDER holds no images in class folders.
    """
    options, others = make_parser().parse_known_args(list(args))
    target: Path | None = options.copy_clean
    if target is not None and options.dry_run:
        raise ConfigError("--copy-clean: --dry-run flags nothing; leave one of them out.")
    if target is not None and target.exists():
        raise ConfigError(f"--copy-clean {target}: it exists already; give a new folder.")
    folder: Path = options.folder
    if target is not None and folder.resolve() in (target.resolve(), *target.resolve().parents):
        raise ConfigError(f"--copy-clean {target}: it lies inside {folder}; give a folder outside.")
    model, data = fit([*_words(options), *others])
    found, samples = model.findings(), data.training_set()
    assert found is not None  # noqa: S101  (the fit is over)
    if options.dry_run:
        print(_worst(found, samples, options.out))
        return
    print(_summary(found, options.out))
    if target is not None:
        source = folder / "train" if (folder / "train").is_dir() else folder
        kept = (~found.flagged).nonzero().flatten().tolist()
        _copy(source, target, [samples.files[row] for row in kept])
        print(f"{len(kept)} files copied to {target}.")


def image_size(folder: Path) -> int:
    """The usual side nearest to the images': 32, 64, 128 or 224.

    Raises:
        DataError: If there are no images.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no images; expected {folder}/CLASS/IMAGE.jpg.")
    sides = []
    for file in files[:: max(1, len(files) // _LOOK_AT)]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except OSError as error:
            raise DataError(f"{file} cannot be read as an image; remove or replace it.") from error
    middle = statistics.median(sides)
    return min(_SIZES, key=lambda size: abs(size - middle))


def _words(options: argparse.Namespace) -> list[str]:
    size = image_size(options.folder) if options.size is None else options.size
    settings = {
        "trainer.precision": "bf16-mixed",
        "trainer.max_epochs": "-1",
        "trainer.reload_dataloaders_every_n_epochs": "1",
        "trainer.num_sanity_val_steps": "0",
        "test_after_fit": "false",
        "run": str(options.out),
        "data": "bdclean.data.ImageFolder",
        "data.root": str(options.folder),
        "data.input_size": str(size),
        "data.splits.defense": "0",
        "data.splits.probe": "0",
        "model": "bdclean.purification.AdvrBD",
    }
    if options.fast:
        settings |= {f"model.{key}": value for key, value in _SHORT.items()}
    if options.dry_run:
        settings["model.until"] = "score"
    return ["fit", *(f"--{key}={value}" for key, value in settings.items())]


def _summary(found: Findings, out: Path) -> str:
    flagged, total = int(found.flagged.sum()), len(found.flagged)
    return (
        f"{flagged} of {total} images are flagged ({100 * flagged / total:.1f} %): "
        f"{out}/suspects.csv, {out}/suspects.png. Not all of them need be poisoned.\n"
        f"The model that was trained without them: {out}/model.safetensors"
    )


def _worst(found: Findings, samples: TrainingSet, out: Path) -> str:
    order = torch.argsort(found.score, descending=True, stable=True)[:10].tolist()
    lines = [f"  {found.score[row]:10.4g}  {samples.files[row]}" for row in order]
    return "\n".join(
        [
            f"Scores of {len(found.score)} images: {out}/suspects.csv. The most suspicious ones:",
            *lines,
            f"Nothing was flagged. Do not use {out}/model.safetensors: it has seen all images.",
        ]
    )


def _copy(source: Path, target: Path, files: Sequence[str]) -> None:
    for name in files:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, place)
