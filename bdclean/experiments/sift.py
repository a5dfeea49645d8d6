"""`bdclean sift FOLDER`: which images of a labelled folder are poisoned, and a model without them.

A thin front for `bdclean fit` with AdvrBD. The user's files are read, never moved or changed.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from bdclean.callbacks import SaveRunConfig
from bdclean.callbacks.suspects import ranking
from bdclean.data import ImageFolder
from bdclean.data.decoding import UNREADABLE
from bdclean.data.sources import class_folders, image_files, require_images
from bdclean.errors import ConfigError, DataError
from bdclean.functional.precision import cpu_has_bfloat16
from bdclean.shipped import find
from bdclean.sifting import AdvrBD
from bdclean.types import Findings, TrainingSet

Fit = Callable[[list[str]], tuple[AdvrBD, ImageFolder]]
"""Runs `bdclean fit` with these words and returns model and data."""

_SIZES = (32, 64, 128, 224)
_LOOK_AT = 50  # files whose size is looked at
_PARTS = ("train", "test", "val")  # of no class folder; and test_*, from `attack export`
_FAST = "sift/advrbd/fast"
_CONTINUE = "--ckpt_path=last"
_TAKEN = {
    "--run": "give the run folder as --out",
    "--data": "sift reads class folders; give FOLDER alone",
    "--data.class_path": "sift reads class folders; give FOLDER alone",
    "--data.root": "give the data as FOLDER",
    "--data.init_args.root": "give the data as FOLDER",
    "--model": "sift is AdvrBD; for another method use bdclean fit with --run instead of --out",
    "--model.until": "give --dry-run to score only",
    "--model.class_path": "sift is AdvrBD; for another method use bdclean fit with --run",
    **{
        f"--trainer.{limit}": "its stages have lengths of their own. Stop it when you like: the "
        "same command goes on"
        for limit in ("max_epochs", "max_steps", "max_time", "limit_train_batches", "fast_dev_run")
    },
}
"""Options of `bdclean fit` that sift sets itself, and what to do instead."""


class SaveSiftConfig(SaveRunConfig):
    """A sift goes on by itself, and only as it began."""

    may_change = False
    way_out = "Name another folder with --out, or delete that one."


def make_parser() -> argparse.ArgumentParser:
    """The command's own options; all others are those of `bdclean fit`."""
    parser = argparse.ArgumentParser(
        prog="bdclean sift",
        usage="bdclean sift FOLDER [options]",
        allow_abbrev=False,  # --da is no --dry-run, and --data none of ours
        description="Finds poisoned images in FOLDER/CLASS/* (or FOLDER/train/CLASS/*) with "
        "AdvrBD, and trains a model on what is left, and then on them too with new labels. Writes "
        "suspects.csv, a picture sheet and model.safetensors into OUT. FOLDER stays as it is. The "
        "same command again continues one that was stopped.",
        epilog="Other words go to `bdclean fit`: --model.arch resnet34, --model.width 16, "
        "--trainer.accelerator gpu, --trainer.precision 32-true, --data.allow_flip false ...",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="One folder for each class.")
    parser.add_argument(
        "--out", type=Path, help="Run folder: runs/sift, or runs/sift-scores of a dry run."
    )
    parser.add_argument("--size", type=int, help="Side of the images; taken from them if left out.")
    parser.add_argument("--fast", action="store_true", help="8 epochs instead of 100.")
    parser.add_argument("--dry-run", action="store_true", help="Score only; flag nothing.")
    parser.add_argument("--copy-clean", type=Path, metavar="DIR", help="Copy what is kept to DIR.")
    return parser


def run_sift(args: Sequence[str], fit: Fit) -> None:
    """The command. Only the first of several processes prints and copies.

    Args:
        args: The words after `bdclean sift`.
        fit: Runs the training.

    Raises:
        ConfigError: If the options contradict each other, or OUT or DIR is in the way.
        DataError: If FOLDER does not hold images in two or more class folders.
    """
    options, others = _parse(list(args))
    out: Path = options.out or Path("runs/sift-scores" if options.dry_run else "runs/sift")
    target: Path | None = options.copy_clean
    first = getattr(rank_zero_only, "rank", 0) == 0
    source = _training_folder(options.folder)
    classes = _classes(source)
    # A class folder may be a link to elsewhere.
    places = [options.folder, source, *(source / name for name in classes)]
    _check_out(out, places)
    if target is not None:
        _check_target(target, out, places)
    size = image_size(source) if options.size is None else options.size
    words = _words(options, size, others, out)
    if first and words[-1] == _CONTINUE:
        print(f"{out} holds a sift that was begun: going on with it.")
    with nullcontext() if target is None or not first else _beside(target) as copy:
        model, data = fit(words)
        if not first:
            return
        found, samples = model.findings(), data.training_set()
        if found is None or not model.finished:
            raise ConfigError(
                f"The fit was stopped before its end, so {out} holds no model to use. Leave out "
                "what limits it (trainer.max_time, trainer.max_steps ...) and name another folder "
                "with --out."
            )
        flagged = found.flagged
        print(_worst(found, samples, out) if flagged is None else _summary(found, samples, out))
        if held_out := len(data.stored) - len(samples.labels):
            print(f"{held_out} images held out by data.splits are neither judged nor copied.")
        if target is not None and copy is not None and flagged is not None:
            kept = (~flagged).nonzero().flatten().tolist()
            _copy(source, copy, target, [samples.files[row] for row in kept])
            print(f"{len(kept)} files copied to {target}.")


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


# ---------------------------------------------------------------------- words


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the words for `bdclean fit`."""
    if args and args[0].startswith("-") and not {"-h", "--help"} & set(args):
        # Nobody but `bdclean fit` knows which of its options take a value.
        raise ConfigError(
            f"{args[0]} stands where FOLDER is expected; FOLDER comes first: bdclean sift FOLDER "
            f"{args[0]} ..."
        )
    options, others = make_parser().parse_known_args(args)
    if others and not others[0].startswith("-"):
        raise ConfigError(
            f"{others[0]!r} is one word too many after FOLDER {options.folder}; give one folder, "
            "in quotes if its name has blanks."
        )
    for word in others:
        name = word.partition("=")[0]
        if name in _TAKEN:
            raise ConfigError(f"{name} is set by sift itself; {_TAKEN[name]}.")
    if options.copy_clean is not None and options.dry_run:
        raise ConfigError("--copy-clean: --dry-run flags nothing; leave one of them out.")
    return options, others


def _words(options: argparse.Namespace, size: int, others: Sequence[str], out: Path) -> list[str]:
    half = torch.accelerator.is_available() or cpu_has_bfloat16()
    settings = {
        "trainer.precision": "bf16-mixed" if half else "32-true",
        "trainer.max_epochs": "-1",
        "trainer.reload_dataloaders_every_n_epochs": "1",
        "trainer.num_sanity_val_steps": "0",
        "test_after_fit": "false",
        "data": "bdclean.data.ImageFolder",
        "data.input_size": str(size),
        "data.splits.defense": "0",
        "data.splits.probe": "0",
        "model": "bdclean.sifting.AdvrBD",
    }
    fast = ["-c", str(find(_FAST, "--fast"))] if options.fast else []
    # At the end: a file given with -c does not move the folders that were looked at.
    last = {
        "model.until": "score" if options.dry_run else "relabel",
        "run": str(out),
        "data.root": str(options.folder),
    }
    words = [*_as_words(settings), *fast, *others, *_as_words(last)]
    asked = any(word.partition("=")[0] == "--ckpt_path" for word in others)
    if (out / "checkpoints" / "last.ckpt").is_file() and not asked:
        words.append(_CONTINUE)
    return ["fit", *words]


def _as_words(settings: dict[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


# ---------------------------------------------------------------------- folders


def _training_folder(folder: Path) -> Path:
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


def _classes(source: Path) -> list[str]:
    """The class folders; there are two at least, each with images."""
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


def _check_out(out: Path, places: Iterable[Path]) -> None:
    """Refuses a run folder in which files of the user could be overwritten."""
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out}: {above} is a file; name a folder.")
    for place in places:
        if _lies_in(out, place):
            raise ConfigError(
                f"--out {out}: it lies in {place}, which stays as it is; name a folder outside."
            )
    if out.exists() and any(out.iterdir()) and not _is_run(out):
        raise ConfigError(
            f"--out {out}: it holds files, but no run of bdclean; name a new or empty folder."
        )


def _is_run(folder: Path) -> bool:
    try:
        lines = (folder / "config.yaml").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    ours = any("class_path: bdclean." in line for line in lines)
    return ours and any(line.startswith("run:") for line in lines)


def _check_target(target: Path, out: Path, places: Iterable[Path]) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError(f"--copy-clean {target}: it exists already; give a new folder.")
    for place in places:
        if _lies_in(target, place):
            raise ConfigError(
                f"--copy-clean {target}: it lies inside {place}; give a folder outside."
            )
    if _lies_in(target, out) or _lies_in(out, target):
        raise ConfigError(
            f"--copy-clean {target}: neither it nor --out {out} may lie in the other; give a "
            "folder outside."
        )


def _lies_in(path: Path, place: Path) -> bool:
    """Whether `path` is `place` or lies below it, whatever they are called."""
    whole, above = path.resolve(), place.resolve()
    chain = (whole, *whole.parents)
    if not above.exists():
        return above in chain
    # The same folder may have two names: another case, another mount.
    return any(folder.exists() and folder.samefile(above) for folder in chain)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """An empty folder next to `target`, to be renamed; made before hours of training."""
    whole = target.resolve()
    new = [folder for folder in whole.parents if not folder.exists()]  # the innermost first
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        beside = TemporaryDirectory(dir=whole.parent, prefix=f".{whole.name}.")
    except OSError as error:
        raise ConfigError(
            f"--copy-clean {target}: the folder cannot be written ({error}); give another one."
        ) from error
    try:
        with beside as name:
            copy = Path(name) / whole.name
            copy.mkdir()
            yield copy
    finally:
        with suppress(OSError):  # it holds something, the copy at best
            for folder in new:
                folder.rmdir()


def _copy(source: Path, copy: Path, target: Path, files: Sequence[str]) -> None:
    try:
        for name in files:
            place = copy / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, place)
        copy.replace(target.resolve())
    except OSError as error:
        raise ConfigError(
            f"--copy-clean {target}: the copy failed ({error}); make room and start the same "
            "command again, which does not train again."
        ) from error


# ---------------------------------------------------------------------- what is printed


def _summary(found: Findings, samples: TrainingSet, out: Path) -> str:
    flagged = found.flagged
    assert flagged is not None  # noqa: S101
    count, total = int(flagged.sum()), len(flagged)
    if not count:
        return (
            f"None of {total} images is flagged; their scores: {out}/suspects.csv.\n"
            f"The model that was trained on all of them: {out}/model.safetensors"
        )
    return (
        f"{count} of {total} images are flagged ({100 * count / total:.1f} %): "
        f"{out}/suspects.csv, {out}/suspects.png. Not all of them need be poisoned.\n"
        f"{_by_class(found, flagged, samples)}"
        f"The model that was trained without them: {out}/before_relabelling.safetensors; then "
        f"also with them, under the labels it gave them: {out}/model.safetensors"
    )


def _by_class(found: Findings, flagged: Tensor, samples: TrainingSet) -> str:
    """The classes with the most flagged images that the clean model names otherwise."""
    labels = samples.labels.long()
    kinds = len(samples.classes)
    size, suspects, otherwise = (
        labels[mask].bincount(minlength=kinds).tolist()
        for mask in (torch.ones_like(flagged), flagged, flagged & (found.proposed != labels))
    )
    order = sorted(range(kinds), key=lambda k: (-otherwise[k], -suspects[k]))
    lines = [
        f"  {_printable(samples.classes[k])}: {suspects[k]} of {size[k]}, of which the clean model "
        f"names {otherwise[k]} otherwise\n"
        for k in order[:5]
        if suspects[k]
    ]
    return "".join(lines)


def _printable(name: str) -> str:
    """File names need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _worst(found: Findings, samples: TrainingSet, out: Path) -> str:
    order = ranking(found.score)[:10].tolist()
    names = [_printable(samples.files[row]) for row in order]
    lines = [f"  {found.score[row]:10.4g}  {n}" for row, n in zip(order, names, strict=True)]
    return "\n".join(
        [
            f"Scores of {len(found.score)} images: {out}/suspects.csv. The most suspicious ones, "
            "as CLASS/FILE:",
            *lines,
            f"Nothing was flagged. Do not use {out}/model.safetensors: it has seen all images.",
        ]
    )
