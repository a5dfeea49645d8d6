"""`bdclean check MODEL [FOLDER]`: label-free tests of whether a model is backdoored.

It reads the weights file and, where a folder is given, some of its images; labels play no part. It
trains nothing and writes nothing. The exit status is 1 where a test finds the model suspicious.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from torch import Tensor

from bdclean.backbones import SplitModel, load_model
from bdclean.backbones.architectures import has_width
from bdclean.backbones.card import normalisation
from bdclean.checking import LARGE, Verdict, run_tests
from bdclean.checking.verdicts import classes_named
from bdclean.commands.cost import tests_line
from bdclean.commands.help_page import WIDTH
from bdclean.commands.model_options import (
    add_model_options,
    add_test_options,
    chosen_tests,
    known_of,
    words_of,
)
from bdclean.commands.parsing import Parser
from bdclean.commands.short_options import short_options
from bdclean.data.decoding import OnError, Reading
from bdclean.data.layout import image_files
from bdclean.data.sources import read_files
from bdclean.errors import DataError, counted
from bdclean.functional.seeds import derive_seed
from bdclean.printable import printable
from bdclean.progress import watch

_SUSPICIOUS, _NO_TEST = 1, 3  # exit statuses; 2 is that of wrong use
_LIMITS = (
    "No test can show that a model is clean: a backdoor of another kind passes them all. "
    "The help of this command names the page that tells what they find and what they miss."
)


@short_options()
def run_check(args: Sequence[str]) -> None:
    """The command.

    Args:
        args: The words after `bdclean check`.

    Raises:
        WeightsError: If the file cannot be read safely or does not fit the architecture.
        DataError: If the folder holds no image that can be read.
        SystemExit: With status 1 if a test finds the model suspicious, 3 if none applies.
    """
    chosen = make_parser().parse_args(list(args))
    tests = chosen_tests("--tests", chosen.tests)
    model = read_model(chosen.model, **known_of(chosen)).eval()
    size = model.info.input_size
    images = None
    if chosen.folder is not None:
        count, on_error = chosen.images or usual_count(size), chosen.data.on_error
        images = images_of(chosen.folder, size, count, chosen.seed, on_error)
    if not chosen.json:
        print(f"{_about(chosen, model, images)} {tests_line(model, images, tests)}", flush=True)
    verdicts = []
    for verdict in run_tests(model, images, chosen.seed, tests, watch):
        verdicts.append(verdict)
        if not chosen.json:
            print(shown(verdict), flush=True)
    states = {each.state for each in verdicts}
    if chosen.json:
        print(json.dumps(_record(chosen, model, images, verdicts), indent=2))
    else:
        print(fill(_summary(verdicts), WIDTH))
        if "suspicious" in states:
            words = ["purify", chosen.model, chosen.folder or "PHOTOS"]
            print(printable(f"Next: {shlex.join(['bdclean', *words, *words_of(chosen)])}"))
    if "suspicious" in states:
        raise SystemExit(_SUSPICIOUS)
    if states == {"not applicable"}:
        raise SystemExit(_NO_TEST)


def make_parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog="bdclean check",
        usage="bdclean check MODEL [FOLDER] [options]",
        description="Tests a model for backdoors, without labels and without knowing a trigger. "
        "Trains and writes nothing. The exit status is 0 if no test finds anything, 1 if one "
        "finds the model suspicious, 2 after wrong use, and 3 if no test applies.",
        example="bdclean check model.safetensors photos --arch resnet18",
        more="docs/how_to/check.md",
    )
    add = parser.add_argument
    add("model", type=str, metavar="MODEL", help="Weights file.")
    add(
        "folder",
        type=str | None,
        nargs="?",
        default=None,
        metavar="FOLDER",
        help="Images such as the model was made for, at any depth and without labels.",
    )
    add_model_options(parser)
    add_test_options(parser)
    add("--data.on_error", type=OnError, default="raise", help="skip leaves out broken images.")
    add("--seed", type=NonNegativeInt, default=0, metavar="N", help="Of choice and perturbation.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser


def read_model(weights: str, **known: Any) -> SplitModel:
    """The model, on the GPU if there is one.

    Args:
        weights: The file.
        known: What it may not say of itself; see `load_model`.

    Raises:
        WeightsError: If the file cannot be read safely or does not fit the architecture.
        ConfigError: If an option is missing or contradicts the file.
    """
    model = load_model(weights, **known)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def usual_count(size: int) -> int:
    """How many images are tested where nobody says: fewer of large ones, which take longer."""
    return 128 if size > LARGE else 500


def images_of(
    folder: str, size: int, count: int, seed: int = 0, on_error: OnError = "raise"
) -> Tensor:
    """Some images of a folder, (N, 3, size, size), float32 in [0, 1], on the GPU if there is one.

    Args:
        folder: With images at any depth.
        size: Side of the images in pixels.
        count: How many, at most.
        seed: Of the choice.
        on_error: What to do with a broken file.

    Raises:
        DataError: If there is no such folder, or it holds none, or one cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"FOLDER {root} is no folder; give one that holds images.")
    files = image_files(root)
    rows = _chosen(len(files), count, seed).tolist()
    reading = Reading(on_error=on_error)
    return _ready(
        read_files(root, [files[row] for row in rows], None, size, reading=reading).images
    )


def some_of(pixels: Tensor, size: int, count: int, seed: int = 0) -> Tensor:
    """The same of images in memory.

    Args:
        pixels: (N, 3, size, size), uint8.
        size: Side of the images in pixels.
        count: How many, at most.
        seed: Of the choice.

    Raises:
        DataError: If they are of another size.
    """
    if pixels.shape[2:] != (size, size):
        raise DataError(
            f"images have shape {tuple(pixels.shape)}, and the model takes (N, 3, {size}, {size})."
        )
    return _ready(pixels[_chosen(len(pixels), count, seed)])


def _chosen(number: int, count: int, seed: int) -> Tensor:
    """Rows of some of `number` images, in random order: files of a class often stand together."""
    draw = torch.Generator().manual_seed(derive_seed("check", seed))
    return torch.randperm(number, generator=draw)[:count]


def _ready(pixels: Tensor) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.as_tensor(pixels).to(device).float() / 255


def shown(verdict: Verdict) -> str:
    """A verdict in lines of text."""
    target = "" if verdict.target is None else f", class {verdict.target}"
    head = f"{verdict.test}: {verdict.state}{target}"
    return f"{head}\n" + fill(f"{verdict.why}.", WIDTH, initial_indent="  ", subsequent_indent="  ")


def _about(chosen: Namespace, model: SplitModel, images: Tensor | None) -> str:
    info = model.info
    head = "no classifier head" if model.head is None else f"{info.num_classes} classes"
    width = f"width {info.width}, " if has_width(info.arch) else ""
    used = "no images" if images is None else f"{len(images):,} images of {chosen.folder}"
    return printable(
        f"{chosen.model}: {info.arch}, {width}{head}, images of {info.input_size} pixels, "
        f"{normalisation(info)}. Tested with {used}."
    )


def _summary(verdicts: Sequence[Verdict]) -> str:
    suspicious = [each for each in verdicts if each.state == "suspicious"]
    ran = [each for each in verdicts if each.state != "not applicable"]
    if not ran:
        return f"No test applies to this model. {_LIMITS}"
    if not suspicious:
        return f"{len(ran)} of {len(verdicts)} tests ran, and found nothing. {_LIMITS}"
    classes = classes_named(suspicious)
    named = f"; answers seem to be led to {classes}" if classes else ""
    return f"Suspicious by {len(suspicious)} of {counted(len(ran), 'test')}{named}. {_LIMITS}"


def _record(
    chosen: Namespace, model: SplitModel, images: Tensor | None, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    return {
        "model": chosen.model,
        "arch": model.info.arch,
        "classes": None if model.head is None else model.info.num_classes,
        "images": None if images is None else len(images),
        "suspicious": any(each.state == "suspicious" for each in verdicts),
        "tests": [asdict(each) for each in verdicts],
    }
