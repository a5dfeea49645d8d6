"""`bdclean sift FOLDER`: which images of a labelled folder are poisoned, and a model without them.

A thin front for `bdclean fit` with AdvrBD. The user's files are read, never moved or changed.
"""

import shlex
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from torch import Tensor

from bdclean.callbacks.suspects import ranking
from bdclean.commands import closing, front
from bdclean.commands.class_folders import classes_of, count_images, image_size, training_folder
from bdclean.data import ImageFolder
from bdclean.errors import ConfigError, counted
from bdclean.functional.tiers import FEWEST, FEWEST_CLASSES, Standing, compare_classes
from bdclean.printable import printable
from bdclean.runs import RunFolder
from bdclean.shipped import find
from bdclean.types import Findings, TrainingSet

_FAST = "sift/advrbd/fast"
_COPY = "--copy_clean"
_FOLDER = "sift reads class folders; give the data as FOLDER alone"
_OTHER = "sift is AdvrBD; use bdclean fit for another method"
_LENGTH = (
    "the stages of sift have lengths of their own. Stop it when you like: the same command goes on"
)
_SHOWN = 5  # classes
_ANY_SIZE = 32  # pixels, as long as nobody looks at the images
_UNUSABLE = "This result is not usable"
_LOOK = (
    f"{_UNUSABLE} before you have looked at its pictures: more than half of one class is flagged, "
    "as after a strong attack or a sift that failed. "
)
_TAKEN = {
    "--out": "it is called --run now",
    **dict.fromkeys(("--data", "--data.class_path"), _FOLDER),
    **dict.fromkeys(("--data.root", "--data.init_args.root"), _FOLDER),
    **dict.fromkeys(("--model", "--model.class_path"), _OTHER),
    "--model.until": "give --dry_run to score only",
    **{
        f"--trainer.{limit}": _LENGTH
        for limit in ("max_epochs", "max_steps", "max_time", "limit_train_batches", "fast_dev_run")
    },
}
"""Options of `bdclean fit` that sift sets itself, and what to do instead."""


def make_parser() -> front.FrontParser:
    """The command's own options; all others are those of `bdclean fit`."""
    parser = front.FrontParser(
        "sift",
        "FOLDER",
        _TAKEN,
        description="Finds poisoned images in FOLDER/CLASS/* (or FOLDER/train/CLASS/*) with "
        "AdvrBD, and trains a model on what is left, and then on them too with new labels. Writes "
        "suspects.csv, a picture sheet and model.safetensors into RUN. FOLDER stays as it is. The "
        "same command again continues one that was stopped.",
        epilog="Other words go to `bdclean fit`: --model.arch resnet34, --model.width 16, "
        "--trainer.accelerator gpu, --trainer.precision 32-true, --data.allow_flip false ...",
        example="bdclean sift photos --run runs/sift",
        more="docs/how_to/sift.md",
    )
    parser.add_argument("folder", type=str, metavar="FOLDER", help="One folder for each class.")
    parser.add_argument(
        "--run",
        type=str | None,
        metavar="RUN",
        help="Run folder; runs/sift, or runs/sift-scores of a dry run, if left out.",
    )
    parser.add_argument(
        "--size",
        type=PositiveInt | None,
        metavar="N",
        help="Side of the images; taken from them if left out.",
    )
    parser.add_argument("--fast", action="store_true", help="8 epochs instead of 100.")
    parser.add_argument("--dry_run", action="store_true", help="Score only; flag nothing.")
    parser.add_argument(
        _COPY, type=str | None, metavar="DIR", help="Copy what is kept to a new folder."
    )
    return parser


def run_sift(args: Sequence[str], fit: front.Fit | None = None) -> None:
    """The command. Only the first of several processes prints and copies.

    Args:
        args: The words after `bdclean sift`.
        fit: Runs the training; None takes that of `bdclean fit`.

    Raises:
        ConfigError: If the options contradict each other, or RUN or DIR is in the way.
        DataError: If FOLDER does not hold images in two or more class folders.
    """
    options, others = make_parser().divide(args)
    if options.copy_clean is not None and options.dry_run:
        raise ConfigError(f"{_COPY}: --dry_run flags nothing; leave one of them out.")
    if not options.folder:
        raise ConfigError("FOLDER='': name a folder that holds CLASS/IMAGE.jpg.")
    default = "runs/sift-scores" if options.dry_run else "runs/sift"
    run = Path(default if options.run is None else options.run)
    target = None if options.copy_clean is None else Path(options.copy_clean)
    if others:
        front.check_words(_words(options, options.size or _ANY_SIZE, others, run))
    source = training_folder(Path(options.folder))
    classes = classes_of(source)
    # A class folder may be a link to elsewhere.
    places = [Path(options.folder), source, *(source / name for name in classes)]
    front.check_run(run, places)
    if target is not None:
        front.check_copy(_COPY, target, run, places)
    size = image_size(source) if options.size is None else options.size
    words = _words(options, size, others, run)
    first = front.is_first_process()
    if first:
        _warn_of_few(count_images(source))
    if first and options.run is None:
        print(f"No --run is given: this sift writes into {run}.")
    if first and words[-1] == front.CONTINUE:
        print(_standing(RunFolder(run), options.dry_run))
    fit = fit or partial(front.fit, again=shlex.join(["bdclean", "sift", *args]))
    with nullcontext() if target is None or not first else front.beside(_COPY, target) as copy:
        model, data = fit(words)
        if first:
            kept = _report(model.findings() if model.finished else None, data, run)
            if target is not None and copy is not None:
                front.copy_files(_COPY, source, kept, copy, target)
                print(f"{counted(len(kept), 'file')} copied to {target}.")
            if not options.dry_run or _leads_on(model, data):
                print(f"Next: {_next(options, others, run, bool(kept))}")


def _warn_of_few(count: int) -> None:
    if count < FEWEST:
        print(
            f"Warning: with {counted(count, 'image')}, fewer than {FEWEST:,}, flags and scores "
            "mean little: so few seldom hold enough poisoned images to plant a backdoor, and clean "
            "ones get flagged.",
            file=sys.stderr,
        )


def _words(options: Namespace, size: int, others: Sequence[str], run: Path) -> list[str]:
    settings = {
        "trainer.precision": front.fast_precision(),
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
        "run": str(run),
        "data.root": options.folder,
    }
    begun = front.going_on(run, others)
    return [*front.defaults(settings, others), *fast, *others, *front.as_words(last), *begun]


def _leads_on(model: Any, data: ImageFolder) -> bool:
    """Whether a whole sift may find more than a dry run that told scores."""
    scored: Findings = model.findings()
    enough = len(data.training_set().labels) * model.rounds.partition_rate >= 1
    return enough and not _are_equal(scored.score)


def _next(options: Namespace, others: Sequence[str], run: Path, kept: bool) -> str:
    """The command that usually comes next."""
    if not options.dry_run and (options.copy_clean is not None or not kept):
        return closing.load(run / "model.safetensors")
    changed = {"--size": options.size, "--run": options.run}
    if options.dry_run:
        changed["--run"] = None if options.run is None else f"{run}-flags"
    else:
        changed[_COPY] = _free(Path(options.folder))
    words = [str(word) for pair in changed.items() if pair[1] is not None for word in pair]
    fast = ["--fast"] if options.fast else []
    return closing.command("sift", [options.folder, *fast, *words, *others])


def _free(folder: Path) -> Path:
    """A name beside a folder that is free for a copy of it."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    copy, number = named.with_name(f"{named.name}-kept"), 1
    while copy.exists():
        number += 1
        copy = named.with_name(f"{named.name}-kept{number}")
    return copy


# ---------------------------------------------------------------------- what is printed


def _standing(run: RunFolder, dry: bool) -> str:
    """How far the sift is that a folder holds."""
    ended = run.is_finished and run.suspects.is_file()
    if ended and (dry or run.read_record().get("protocol", {}).get("retrained")):
        files = closing.written(run.path).partition(": ")[2]
        return f"{run.path} holds this sift, and it is finished; nothing is trained. See {files}."
    return f"{run.path} holds a sift that was begun: going on with it."


def _report(found: Findings | None, data: ImageFolder, run: Path) -> list[str]:
    """Prints what was found; returns the files that are not flagged."""
    if found is None:
        raise ConfigError(
            f"The fit was stopped before its end, so {run} holds no model to use. Leave out "
            "what limits it (trainer.max_time, trainer.max_steps ...) and name another folder "
            "with --run."
        )
    samples, flagged = data.training_set(), found.flagged
    print(_worst(found, samples, run) if flagged is None else _summary(found, samples, run))
    if held_out := len(data.stored) - len(samples.labels):
        print(
            f"{counted(held_out, 'image')} held out by data.splits {_be(held_out)} neither judged "
            "nor copied."
        )
    if flagged is None:
        return []
    return [samples.files[row] for row in (~flagged).nonzero().flatten().tolist()]


def _summary(found: Findings, samples: TrainingSet, run: Path) -> str:
    flagged = found.flagged
    assert flagged is not None  # noqa: S101
    count, total = int(flagged.sum()), len(flagged)
    doubt = _doubt(flagged, samples)
    if not count:
        return (
            f"{doubt}None of {total} images is flagged; their scores: {run}/suspects.csv.\n"
            f"The model that was trained on all of them: {run}/model.safetensors"
        )
    models = (
        f"Do not use the models in {run}: too much was taken from them, or named anew."
        if doubt not in ("", _LOOK)
        else f"The model that was trained without them: {run}/before_relabelling.safetensors; then "
        f"also with them, under the labels it gave them: {run}/model.safetensors"
    )
    standing = compare_classes(samples.labels.long(), flagged, found.proposed)
    told = "" if doubt not in ("", _LOOK) else _verdict(standing, samples)
    listed = "" if told and standing.attacked is None else _by_class(standing, samples)
    return (
        f"{doubt}{count} of {total} images {_be(count)} flagged ({100 * count / total:.1f} %): "
        f"{run}/suspects.csv, {run}/suspects.png. Not all of them need be poisoned.\n"
        f"{told}{listed}{models}"
    )


def _verdict(standing: Standing, samples: TrainingSet) -> str:
    """Whether one class stands out, and by what."""
    shares = {k: 100 * standing.renamed[k] / size for k, size in enumerate(standing.sizes) if size}
    target = standing.attacked
    if target is None and len(shares) < FEWEST_CLASSES:
        return (
            f"No class is named: of fewer than {FEWEST_CLASSES} classes, a hard one looks like an "
            "attacked one.\n"
        )
    if target is None:
        return (
            f"No class stands out: {_span(shares.values())} of each are flagged and named "
            "otherwise by the clean model, as hard images are. That is no proof of clean images: "
            "few poisoned images, an attack on every class or from one class alone, or one that "
            "leaves labels as they are may look like this too.\n"
        )
    likely, own = standing.renamed[target], shares.pop(target)
    return (
        f"Class {printable(samples.classes[target])} is probably attacked: {likely:,} likely. So "
        f"many of its {standing.sizes[target]:,} images ({own:.0f} %) are flagged and named "
        f"otherwise by the clean model, spread over {standing.kinds[target]} other classes; of the "
        f"other classes {_span(shares.values())} are, and hard images go to a few neighbours.\n"
    )


def _span(shares: Collection[float]) -> str:
    return f"{min(shares):.0f} to {max(shares):.0f} %"


def _doubt(flagged: Tensor | None, samples: TrainingSet) -> str:
    """The sentence on why nobody should trust what was found; empty where nothing speaks for it.

    One class of which most is flagged may be the target of an attack that poisons many images.
    Of several classes no attack makes that, and a failed sift does.

    Args:
        flagged: (N,); None where nothing is flagged.
        samples: What was judged.
    """
    labels, few = samples.labels.long(), f"{_UNUSABLE}: it takes {FEWEST:,} images or more. "
    if flagged is None or not flagged.any():
        return few if len(labels) < FEWEST else ""
    if 2 * int(flagged.sum()) > len(flagged):
        return f"{_UNUSABLE}: more than half of all images are flagged. "
    kinds = len(samples.classes)
    sizes, found = (each.bincount(minlength=kinds) for each in (labels, labels[flagged]))
    most = int((2 * found > sizes).sum())
    if most > 1:
        return f"{_UNUSABLE}: more than half is flagged of {most} of the {kinds} classes. "
    if len(labels) < FEWEST:
        return few
    return _LOOK if most else ""


def _by_class(standing: Standing, samples: TrainingSet) -> str:
    """The classes with the most flagged images, a few of them.

    Those come first that the clean model names otherwise, where one of them stands out; else
    those of which the largest share is flagged.
    """
    size, suspects, otherwise = standing.sizes, standing.flagged, standing.renamed
    told = standing.attacked is not None

    def rank(k: int) -> tuple[float, int]:
        return (-otherwise[k] if told else -suspects[k] / max(size[k], 1), -suspects[k])

    order = [k for k in sorted(range(len(size)), key=rank) if suspects[k]]
    lines = [
        f"  {printable(samples.classes[k])}: {suspects[k]} of {size[k]}, of which the clean model "
        f"names {otherwise[k]} otherwise\n"
        for k in order[:_SHOWN]
    ]
    more = len(order) - _SHOWN
    lines += [f"  and some of {more} more class{'es' * (more > 1)}\n"] if more > 0 else []
    return "".join(lines)


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _worst(found: Findings, samples: TrainingSet, run: Path) -> str:
    """What a dry run tells of its scores, which are no finding yet."""
    scored = counted(len(found.score), "image")
    told = f"{_doubt(None, samples)}Scores of {scored}: {run}/suspects.csv."
    last = f"Nothing was flagged. Do not use {run}/model.safetensors: it has seen all images."
    if _are_equal(found.score):
        return f"{told} All are equal, so that they tell nothing.\n{last}"
    order = ranking(found.score)[:10].tolist()
    names = [printable(samples.files[row]) for row in order]
    scores = [float(found.score[row]) + 0.0 for row in order]  # -0.0 becomes 0.0
    lines = [f"  {score:10.2e}  {name}" for score, name in zip(scores, names, strict=True)]
    return "\n".join([f"{told} The {len(names)} highest, as CLASS/FILE:", *lines, last])


def _are_equal(score: Tensor) -> bool:
    """Whether all scores are one number, or none, as those of a network that did not learn."""
    return bool(score.isnan().all()) or bool((score == score[0]).all())
