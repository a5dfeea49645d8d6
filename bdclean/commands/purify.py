"""`bdclean purify MODEL FOLDER`: cleans a model with unlabelled images.

A thin front for `bdclean fit` with a purifier; the tests of `bdclean check` run before and after.
The user's files are read, never moved or changed.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from bdclean.backbones import ModelInfo, load_model, save_like
from bdclean.checking import Verdict, run_tests
from bdclean.commands import front
from bdclean.commands.check import images_of, read_model, shown, usual_count
from bdclean.commands.closing import load, written
from bdclean.commands.help_page import WIDTH
from bdclean.commands.short_options import short_options
from bdclean.errors import ConfigError
from bdclean.files import FORMAT_KEY, SAFETENSORS, safetensors_metadata, write_text
from bdclean.runs import RunFolder
from bdclean.shipped import find
from bdclean.weights import TORCH_SUFFIXES

CONFIGS: Mapping[str, str] = {
    "shortcut": "purify/shortcut",
    "bcu": "purify/bcu",
    "cbd": "purify/cbd/fast",
}
"""The config of each method, by its name."""

_DATA = "purify reads a folder of images; give it as FOLDER alone"
_FILE = "give the weights file as MODEL alone"
_TAKEN = {
    **dict.fromkeys(("--data", "--data.class_path"), _DATA),
    **dict.fromkeys(("--data.root", "--data.defense_root"), _DATA),
    **dict.fromkeys(("--model", "--model.class_path"), "give --method, or use bdclean fit"),
    "--model.weights": _FILE,
    **{f"--model.{key}": f"it is called --{key}" for key in ("arch", "width")},
    "--data.input_size": "it is called --input_size",
}
"""Options of `bdclean fit` that purify sets itself, and what to do instead."""

_LITTLE = 0.8  # agreement with the suspect
_UNKNOWN = (
    "Whether a backdoor is gone cannot be known without its trigger. Fewer suspicious tests and "
    "high agreement are evidence, no proof."
)


def make_parser() -> front.FrontParser:
    """The command's own options; all others are those of `bdclean fit`."""
    parser = front.FrontParser(
        "purify",
        "MODEL FOLDER",
        _TAKEN,
        description="Removes a backdoor from a model with images such as it was made for, without "
        "labels and without knowing a trigger, and runs the tests of `bdclean check` before and "
        "after. Writes RUN/model.safetensors and, of a model from elsewhere, FILE with the names, "
        "the nesting and the precision of MODEL. MODEL and FOLDER stay as they are. The same "
        "command again continues one that was stopped.",
        epilog="Other words go to `bdclean fit`: --model.recipe.epochs 20, --trainer.accelerator "
        "gpu, --trainer.precision 32-true ...",
        example="bdclean purify model.safetensors photos --run runs/purified",
        more="docs/how_to/purify.md",
    )
    add = parser.add_argument
    add("model", type=str, metavar="MODEL", help="Weights file.")
    add("folder", type=str, metavar="FOLDER", help="Images, at any depth and without labels.")
    add("--method", type=str, default="shortcut", metavar="NAME", help=f"{', '.join(CONFIGS)}.")
    add("--run", type=str, default="runs/purified", metavar="RUN", help="Run folder.")
    add(
        "--out",
        type=str | None,
        metavar="FILE",
        help="Cleaned weights as in MODEL, .safetensors or .pth; RUN/purified.safetensors if left "
        "out.",
    )
    add("--arch", type=str | None, metavar="NAME", help="Architecture of a foreign file.")
    add("--width", type=PositiveInt | None, metavar="N", help="Channels of its first layer.")
    add("--input_size", type=PositiveInt | None, metavar="N", help="Side of its images.")
    return parser


@short_options()
def run_purify(args: Sequence[str], fit: front.Fit | None = None) -> None:
    """The command. Only the first of several processes checks and prints.

    Args:
        args: The words after `bdclean purify`.
        fit: Runs the training; None takes that of `bdclean fit`.

    Raises:
        ConfigError: If the options contradict each other, or RUN is in the way.
        WeightsError: If MODEL cannot be read safely, or does not fit the architecture.
        DataError: If FOLDER holds no images.
    """
    options, others = make_parser().divide(args)
    if options.method not in CONFIGS:
        raise ConfigError(f"--method {options.method}: it must be {', '.join(CONFIGS)}.")
    run, suspect = RunFolder(Path(options.run)), read_model(options)
    front.check_run(run.path, [Path(options.folder)])
    out = _check_out(options, run)
    words = _words(options, suspect.info, others)
    if others:
        front.check_words(words)
    size = suspect.info.input_size
    images = images_of(options.folder, size, usual_count(size))
    first = front.is_first_process()
    before = _check("Before", suspect, images) if first else []
    fit = fit or partial(front.fit, again=shlex.join(["bdclean", "purify", *args]))
    model, _ = fit(words)
    if first and model.finished:
        product = load_model(run.weights, arch=suspect.info.arch).to(images.device)
        after = _check("After", product, images)
        _save(run, before, after)
        print(_summary(run, before, after))
        if out is not None:
            _, notes = save_like(options.model, product, out)
            print("\n".join([f"Written as {options.model} was: {out}", *notes, _load_it(out)]))


def _check(when: str, model: Any, images: torch.Tensor) -> list[Verdict]:
    print(f"{when}, without labels:", flush=True)
    verdicts = []
    for verdict in run_tests(model.eval(), images):
        verdicts.append(verdict)
        print(shown(verdict), flush=True)
    return verdicts


def _check_out(options: Namespace, run: RunFolder) -> Path | None:
    """Where the weights go in the layout of MODEL; None for a file of ours without --out.

    Raises:
        ConfigError: If that file is MODEL, or lies in FOLDER, or is another one that exists.
    """
    if options.out is None:
        ours = FORMAT_KEY in safetensors_metadata(options.model)
        return None if ours else run.path / "purified.safetensors"
    out = Path(options.out)
    if out.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise ConfigError(f"--out {out}: it must end in .safetensors or .pth.")
    if front.lies_in(out, Path(options.folder)):
        raise ConfigError(f"--out {out}: it lies in {options.folder}, which stays as it is.")
    if out.exists() and not run.is_finished:
        raise ConfigError(f"--out {out}: it exists already; give a new name.")
    return out


def _load_it(out: Path) -> str:
    """How a state dict is read in plain PyTorch."""
    if out.suffix == SAFETENSORS:
        return (
            "Load it:\n"
            "  from safetensors.torch import load_file\n"
            f"  network.load_state_dict(load_file({str(out)!r}))"
        )
    return (
        "Load it as the file that it stands for: torch.load("
        f"{str(out)!r}, weights_only=True) has its keys."
    )


def _words(options: Namespace, info: ModelInfo, others: Sequence[str]) -> list[str]:
    settings = {
        "trainer.precision": front.fast_precision(),
        "trainer.num_sanity_val_steps": "0",
        "test_after_fit": "false",
        "data": "bdclean.data.ImageFolder",
        **{f"data.{key}": str(list(getattr(info, key))) for key in ("mean", "std")},
    }
    named = {"arch": options.arch, "width": options.width}
    last = {
        "run": options.run,
        "data.input_size": str(info.input_size),
        "data.num_classes": str(info.num_classes or 1),
        "data.defense_root": options.folder,
        "model.weights": options.model,
        **{f"model.{key}": str(value) for key, value in named.items() if value is not None},
    }
    if options.method == "cbd":
        last["model.probe"] = "null"  # it would need labels
    config = ["-c", str(find(CONFIGS[options.method], "--method"))]
    begun = front.going_on(Path(options.run), others)
    return [*front.defaults(settings, others), *config, *others, *front.as_words(last), *begun]


def _save(run: RunFolder, before: Sequence[Verdict], after: Sequence[Verdict]) -> None:
    checks = {"before": [asdict(v) for v in before], "after": [asdict(v) for v in after]}
    write_text(run.path / "checks.json", json.dumps(checks, indent=2) + "\n")


def _summary(run: RunFolder, before: Sequence[Verdict], after: Sequence[Verdict]) -> str:
    lines = [written(run.path)]
    agreement = run.read_record()["protocol"].get("agreement")
    if agreement is not None:
        lines.append(
            f"On images held out, {100 * agreement:.1f} % of the answers are those of the suspect."
        )
        if agreement < _LITTLE:
            lines.append(
                "That is little: the model has lost more than a backdoor. Give more images, such "
                "as the model was made for, or more epochs (--model.recipe.epochs)."
            )
    counts = [sum(v.state == "suspicious" for v in verdicts) for verdicts in (before, after)]
    lines.append(f"Suspicious tests: {counts[0]} before, {counts[1]} after.")
    return "\n".join([*lines, fill(_UNKNOWN, WIDTH), f"As a model of bdclean: {load(run.weights)}"])
