"""`bdclean weights inspect | export`: what a weights file is, and the same in another format.

Nothing in a file is executed, and nothing is downloaded or uploaded.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill, indent

from jsonargparse import Namespace

from bdclean.backbones import (
    Candidate,
    Inspection,
    export_hub,
    export_onnx,
    export_state,
    inspect,
    load_model,
    save_model,
)
from bdclean.backbones.card import images_taken, in_short
from bdclean.backbones.exporting import ONNX
from bdclean.backbones.loading_lines import loading_lines
from bdclean.commands.help_page import WIDTH
from bdclean.commands.model_options import add_model_options, known_of
from bdclean.commands.parsing import Parser
from bdclean.commands.short_options import short_options, shortened
from bdclean.errors import ConfigError, WeightsError, counted
from bdclean.files import SAFETENSORS
from bdclean.printable import printable
from bdclean.weights import TORCH_SUFFIXES

_MORE = "docs/how_to/weights.md"
_COLUMN = 14
_SHOWN = 8
_EXAMPLES = {
    "inspect": "bdclean weights inspect suspect.pth",
    "export": "bdclean weights export suspect.pth model.onnx --arch torchvision:resnet18",
}
_KINDS = {
    "safetensors": "a state dict",
    "state_dict": "the same for torch.load",
    "onnx": "with the normalisation inside",
    "hf": "a folder for the Hugging Face Hub, which timm loads",
    "bdclean": "a file of ours, which names its network",
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
    if config.subcommand == "inspect":
        _inspect(chosen.file, as_json=chosen.json)
    else:
        _export(chosen)


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
    commands.add_subcommand("export", _export_parser(), help="The same in another format.")
    return parser


def _export_parser() -> Parser:
    parser = Parser(
        usage="bdclean weights export FILE OUT [options]",
        description="Writes a model in another format. FILE stays as it is, and nothing is "
        "overwritten. A state dict has the names of torchvision or timm, whatever FILE has.",
        epilog=f"Kinds: {'; '.join(f'{kind}: {what}' for kind, what in _KINDS.items())}.",
        example=_EXAMPLES["export"],
        more=_MORE,
    )
    add = parser.add_argument
    add("file", type=str, metavar="FILE", help="Weights file, of ours or from elsewhere.")
    add("out", type=str, metavar="OUT", help="New file, or new folder (hf).")
    add(
        "--to",
        type=str | None,
        metavar="KIND",
        help=f"{', '.join(_KINDS)}; that of OUT's ending if left out: .onnx, .safetensors, .pth, "
        "and hf without one.",
    )
    add_model_options(parser)
    return parser


def _export(chosen: Namespace) -> None:
    out = Path(chosen.out)
    kind = _kind(chosen.to, out)
    if out.exists():
        raise ConfigError(f"OUT {printable(out)} exists already; give a new name.")
    model = load_model(chosen.file, **known_of(chosen)).eval()
    info = model.info
    print(printable(f"{chosen.file}: {in_short(info)}"))
    inside, beside = images_taken(info, inside=True), images_taken(info, inside=False)
    if kind == "onnx":
        off = export_onnx(model, out)
        said = [f"onnxruntime gives the answers of the model, to {off:.1g} of the largest.", inside]
    elif kind == "bdclean":
        save_model(model, out)
        said = [inside]
    elif kind == "hf":
        export_hub(model, out)
        said = [beside if info.arch.startswith("timm:") else inside]
    else:
        export_state(model, out)
        said = [f"Names are those of {info.arch}; numbers are float32.", beside]
    print("\n".join([printable(f"Written: {out} ({kind})"), *said]))
    if kind != "onnx":
        print(f"Load it:\n{indent(loading_lines(out, info), '  ')}")


def _kind(asked: str | None, out: Path) -> str:
    """The kind of the output, which has to fit its name.

    Raises:
        ConfigError: If there is no such kind, or the name is that of another one.
    """
    if asked is not None and asked not in _KINDS:
        raise ConfigError(f"--to {asked}: it must be {', '.join(_KINDS)}.")
    endings = {ONNX: ("onnx",), SAFETENSORS: ("safetensors", "bdclean"), "": ("hf",)}
    endings |= dict.fromkeys(TORCH_SUFFIXES, ("state_dict",))
    fitting = ("hf",) if asked == "hf" else endings.get(out.suffix, ())
    if not fitting or asked not in (None, *fitting):
        known = {"onnx": ONNX, "state_dict": ".pth", "safetensors": SAFETENSORS}
        wanted = f"in {known.get(asked or '', SAFETENSORS)}"
        wanted = wanted if asked else "in .onnx, .safetensors or .pth, or be a folder (--to hf)"
        raise ConfigError(f"OUT {printable(out)}: it must end {wanted}.")
    return asked or fitting[0]


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
    yield _row("numbers", _listed(numbers) or "none")
    yield _row("not finite", _listed(found.not_finite) or "none")
    if found.metadata:
        pairs = [f"{key}={value}" for key, value in found.metadata.items()]
        yield _row("metadata", _listed(pairs, len(pairs)))
    if found.unusable is not None:
        yield _row("loading", shortened(found.unusable))


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
