"""`bdclean weights inspect | export`: what a weights file is, and the same in another format.

Nothing in a file is executed, and nothing is downloaded or uploaded.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from textwrap import fill

from bdclean.backbones import Candidate, Inspection, inspect
from bdclean.commands.help_page import WIDTH
from bdclean.commands.parsing import Parser
from bdclean.commands.short_options import short_options
from bdclean.errors import WeightsError, counted
from bdclean.printable import printable

_MORE = "docs/how_to/weights.md"
_COLUMN = 14
_SHOWN = 8
_EXAMPLES = {
    "inspect": "bdclean weights inspect suspect.pth",
}


@short_options()
def run_weights(args: Sequence[str]) -> None:
    """The command.

    Args:
        args: The words after `bdclean weights`.

    Raises:
        WeightsError: If the file cannot be read safely, or does not fit the architecture.
        ConfigError: If an option is missing or contradicts the file.
    """
    config = make_parser().parse_args(list(args))
    chosen = config[config.subcommand]
    _inspect(chosen.file, as_json=chosen.json)


def make_parser() -> Parser:
    """The parser of all commands on weights."""
    parser = Parser(
        prog="bdclean weights",
        usage="bdclean weights {inspect,export} ...",
        description="Tells what a weights file holds, or writes it in another format.",
        example=_EXAMPLES["inspect"],
        more=_MORE,
    )
    commands = parser.add_subcommands()
    inspector = Parser(
        usage="bdclean weights inspect FILE [--json]",
        description="Tells what a weights file holds: its kind and hash, the state dicts in it, "
        "the architectures that it fits and why, classes, images, precision, what no network "
        "takes, and numbers that are not finite. Executes nothing. The exit status is 0 if the "
        "file can be read safely, and 2 if not: then it is told what its pickle asks for.",
        example=_EXAMPLES["inspect"],
        more=_MORE,
    )
    inspector.add_argument("file", type=str, metavar="FILE", help="Weights file, of any kind.")
    inspector.add_argument(
        "--json", action="store_true", help="Print one JSON object and nothing else."
    )
    commands.add_subcommand("inspect", inspector, help="What a weights file holds.")
    return parser


def _inspect(file: str, *, as_json: bool) -> None:
    found = inspect(file)
    if as_json:
        print(json.dumps({"path": file, **asdict(found)}, indent=2))
    else:
        print("\n".join(_lines(file, found)))
    if found.unreadable is not None:
        raise WeightsError(found.unreadable)


def _lines(file: str, found: Inspection) -> Iterator[str]:
    facts = found.file
    yield printable(f"{file}: {facts.kind}, {facts.size:,} bytes")
    yield _row("SHA-256", facts.sha256 or "not computed: the file is too large to be read")
    if facts.objects:
        asked = f"{_listed(facts.objects)}; whoever loads it without care runs them"
        yield _row("pickle names", asked)
    if found.unreadable is not None:
        return
    dicts = [
        f"{each.where or 'the top level'} ({counted(each.tensors, 'tensor')})"
        for each in found.state_dicts
    ]
    yield _row("state dicts", _listed(dicts))
    yield from _of_network(found)
    numbers = [
        f"{values:,} in {counted(tensors, 'tensor')} of {kind}"
        for kind, (tensors, values) in found.dtypes.items()
    ]
    yield _row("numbers", _listed(numbers))
    yield _row("not finite", _listed(found.not_finite) or "none")
    if found.metadata:
        pairs = [f"{key}={value}" for key, value in found.metadata.items()]
        yield _row("metadata", _listed(pairs, len(pairs)))
    if found.unusable is not None:
        yield _row("loading", found.unusable)


def _of_network(found: Inspection) -> Iterator[str]:
    if not found.candidates:
        return
    named = f", by the names of {found.library}" if found.library else ""
    yield _row("network", f"in {found.where or 'the top level'}{named}")
    if found.copies:
        yield _row("copies", f"also in {_listed(found.copies)}, which are not read")
    for number, each in enumerate(found.candidates):
        yield _row("" if number else "architecture", _said(each))
    yield _row("evidence", found.evidence)
    classes = found.candidates[0].num_classes
    yield _row("classes", "no classifier" if classes is None else f"{classes:,}")
    for title, names in (("beside it", found.beside), ("left over", found.leftovers)):
        if names:
            yield _row(title, f"{counted(len(names), 'tensor')}: {_listed(names)}")


def _said(each: Candidate) -> str:
    own = f", width {each.width}, stem {each.stem}" if ":" not in each.arch else ""
    mean, std = (" ".join(f"{value:g}" for value in row) for row in (each.mean, each.std))
    others = f"; less common: {_listed(each.others)}" if each.others else ""
    return f"{each.arch}{own}, images of {each.input_size} pixels, mean {mean}, std {std}{others}"


def _row(title: str, text: str) -> str:
    begin = f"  {title}".ljust(_COLUMN + 2)
    blank = " " * len(begin)
    return fill(
        printable(text),
        WIDTH,
        initial_indent=begin,
        subsequent_indent=blank,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _listed(names: Sequence[str], shown: int = _SHOWN) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
