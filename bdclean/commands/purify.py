"""`bdclean purify MODEL FOLDER`: cleans a model with unlabelled images.

A thin front for `bdclean fit` with a purifier: the options, and what is said at the end. The work
is in `bdclean.commands.purifying`.
"""

from collections.abc import Sequence
from textwrap import fill, indent

from jsonargparse.typing import NonNegativeInt

from bdclean.commands import front
from bdclean.commands.canary import canary_lines
from bdclean.commands.closing import load, written
from bdclean.commands.help_page import WIDTH
from bdclean.commands.model_options import add_model_options, add_test_options, chosen_tests
from bdclean.commands.purify_job import Job, PurifyResult
from bdclean.commands.purify_report import (
    CARD,
    PAGE,
    UNKNOWN,
    evidence,
    scores_lines,
)
from bdclean.commands.purifying import CONFIGS, command, purify_model
from bdclean.commands.short_options import short_options
from bdclean.progress import watch

_DATA = "purify reads a folder of images; give it as FOLDER alone"
_FILE = "give the weights file as MODEL alone"
TAKEN = {
    **dict.fromkeys(("--data", "--data.class_path"), _DATA),
    **dict.fromkeys(("--data.root", "--data.defense_root"), _DATA),
    **dict.fromkeys(("--model", "--model.class_path"), "give --method, or use bdclean fit"),
    "--model.weights": _FILE,
    **{f"--model.{key}": f"it is called --{key}" for key in ("arch", "width")},
    **{f"--data.{key}": f"it is called --{key}" for key in ("input_size", "mean", "std")},
}
"""Options of `bdclean fit` that purify sets itself, and what to do instead."""


def make_parser() -> front.FrontParser:
    """The command's own options; all others are those of `bdclean fit`."""
    parser = front.FrontParser(
        "purify",
        "MODEL FOLDER",
        TAKEN,
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
    add("--method", type=str, default="auto", metavar="NAME", help=f"{', '.join(CONFIGS)}.")
    add("--run", type=str, default="runs/purified", metavar="RUN", help="Run folder.")
    add(
        "--out",
        type=str | None,
        metavar="FILE",
        help="Cleaned weights as in MODEL, .safetensors or .pth; RUN/purified.safetensors if left "
        "out.",
    )
    add(
        "--labels",
        type=str | None,
        metavar="DIR",
        help="Labelled images, one folder a class: measures ACC before and after. The method does "
        "not see them.",
    )
    add(
        "--trigger",
        type=str | None,
        metavar="FILE",
        help="A trigger.safetensors: measures ASR and PA on the images of --labels.",
    )
    add(
        "--target",
        type=NonNegativeInt | None,
        metavar="N",
        help="Class of the trigger; that of the plan.json beside it if left out.",
    )
    add(
        "--canary",
        action="store_true",
        help="Also plant triggers of ours in a copy, purify that, and measure them; as long again.",
    )
    add_test_options(parser)
    add_model_options(parser)
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
    given = vars(options)
    given["tests"] = chosen_tests("--tests", given["tests"])
    known = {key: given.pop(key) for key in ("stem", "mean", "std")}
    job = Job(**given, known=known, words=tuple(others), again=command(args))
    result = purify_model(job, fit, watch=watch)
    if result is not None:
        print(_closing(job, result))


def _closing(job: Job, result: PurifyResult) -> str:
    """What is said at the end."""
    assert result.run is not None  # noqa: S101  (the command keeps it)
    lines = [written(result.run, ("model.safetensors", "result.json", PAGE, CARD))]
    lines += evidence(result.before, result.after, result.record, result.agreement)
    lines += [*scores_lines(result.measured), *canary_lines(result.canaries)]
    lines.append(UNKNOWN)
    lines = [fill(line, WIDTH) for line in lines]
    lines += [f"As a model of bdclean: {load(result.run / 'model.safetensors')}"]
    if result.out is not None:
        lines += [f"Written as {job.model} was: {result.out}", *result.notes]
        lines += ["Load it:", indent(result.code, "  ")]
    return "\n".join(lines)
