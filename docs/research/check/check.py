"""What the label-free tests of `bdclean check` see in networks of which the truth is known.

    python docs/research/check/check.py RUN ... --out record.json

RUN is the folder of a finished fit of a classifier. A line holds where each family of perturbations
sends the answers to 500 held-out training images, drawn at random, how far it gathers the features,
the smallest trigger for the backbone, the largest margins of all classes, and, for the judgement of
the tests, what the run says of the attack. `--set` marks runs on which bounds were set. A line of
the same run is replaced. The tables that it prints judge all lines by the present bounds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bdclean.backbones import load_model
from bdclean.backbones.architectures import has_width
from bdclean.checking import (
    Flips,
    Gathered,
    Margins,
    SmallestTrigger,
    Verdict,
    count_flips,
    gather_features,
    maximum_margins,
    smallest_trigger,
)
from bdclean.checking.verdicts import (
    judge_flips,
    judge_gathering,
    judge_margins,
    judge_trigger,
    p_value,
)
from bdclean.commands.check import some_of
from bdclean.files import write_text
from bdclean.functional.gathering import Gathering
from bdclean.runs import RunFolder

IMAGES = 500


def measure(folder: Path, bounds: str = "checked") -> dict[str, Any]:
    """The line of a run, whose bounds were `set` or are `checked` on it."""
    run = RunFolder(folder)
    data, record = run.make_data(), run.read_record()
    model = load_model(folder / "model.safetensors").eval()
    held = data.role_images("defense", labels=False)
    images = some_of(held.everything()["image"], model.info.input_size, IMAGES)
    began = time.monotonic()
    found = list(count_flips(model, images))
    gathered = [
        {"family": each.family, "images": each.images, "share": round(each.gathering.share, 4)}
        for each in gather_features(model, images)
    ]
    between = time.monotonic()
    trigger = smallest_trigger(model, images)
    after = time.monotonic()
    margins = asdict(maximum_margins(model))
    return {
        "run": folder.name,
        "data": Path(data.root).name if data.name == "folder" else data.name,
        "arch": model.info.arch,
        "width": model.info.width if has_width(model.info.arch) else None,
        "seed": record["seed"],
        "attack": None if data.attack is None else type(data.attack).__name__,
        "rule": getattr(data.attack, "label_rule", None),
        "target": getattr(data.attack, "target", None),
        "bounds": bounds,
        "metrics": {k: record["metrics"].get(k) for k in ("acc", "asr", "pa")},
        "flips": [asdict(each) for each in found],
        "gathered": gathered,
        "trigger": asdict(trigger),
        "margins": margins | {"largest": [round(r, 3) for r in margins["largest"]]},
        "seconds": {
            "flips": round(between - began),
            "trigger": round(after - between),
            "margins": round(time.monotonic() - after),
        },
    }


def verdicts(line: Mapping[str, Any]) -> list[Verdict]:
    """What the tests say of a line by their present bounds."""
    flips = [Flips(**each | {"landed": tuple(each["landed"])}) for each in line["flips"]]
    margins = Margins(**line["margins"])
    return [
        *map(judge_flips, flips),
        judge_trigger(SmallestTrigger(**line["trigger"])),
        judge_margins(margins),
    ]


def verdicts_headless(line: Mapping[str, Any]) -> list[Verdict]:
    """The same of the backbone alone."""
    nowhere = torch.zeros(1)  # the point plays no part
    return [
        *(
            judge_gathering(
                Gathered(each["family"], each["images"], Gathering(each["share"], nowhere))
            )
            for each in line["gathered"]
        ),
        judge_trigger(SmallestTrigger(**line["trigger"])),
    ]


def shown(verdict: Verdict) -> str:
    """A cell: the statistic, in bold where it is suspicious, and the class that it points to."""
    told = verdict.statistics or {}
    if verdict.test == "MM-BD":
        cell = f"p {p_value(told['p'])}"
    elif verdict.test == "DECREE":
        cell = f"{100 * told['share']:.1f}" if told else "-"
    else:
        cell = f"{100 * told.get('piled', told.get('gathered', 0.0)):.0f}"
    if verdict.state != "suspicious":
        return cell
    return f"**{cell}**" if verdict.target is None else f"**{cell}** ({verdict.target})"


Judge = Callable[[Mapping[str, Any]], list[Verdict]]


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """All networks and what each test finds: of classifiers, then of their backbones alone."""
    parts = [*_tables(lines, verdicts), "Of the backbones alone, without their heads:", ""]
    return "\n".join([*parts, *_tables(lines, verdicts_headless)]).rstrip() + "\n"


def _tables(lines: Sequence[Mapping[str, Any]], judge: Judge) -> Iterator[str]:
    tests = [verdict.test for verdict in judge(lines[0])]
    head = ["bounds", "data", "network", "seed", "attack", "target", "ACC", "ASR", *tests]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for line in sorted(lines, key=lambda each: (each["attack"] is not None, each["bounds"])):
        network = f"{line['arch']}, width {line['width']}" if line["width"] else line["arch"]
        asr = line["metrics"]["asr"]
        rates = [f"{line['metrics']['acc']:.1f}", "-" if asr is None else f"{asr:.1f}"]
        target = "-" if _target(line) is None else str(_target(line))
        attack = [line["attack"] or "none", target if line["rule"] != "all_to_all" else "all"]
        cells = [line["bounds"], line["data"], network, str(line["seed"]), *attack, *rates]
        yield f"| {' | '.join([*cells, *map(shown, judge(line))])} |"
    for bounds in ("set", "checked"):
        yield ""
        yield from _counts([line for line in lines if line["bounds"] == bounds], judge, bounds)
    yield ""


def _target(line: Mapping[str, Any]) -> int | None:
    """The class that all triggers lead to; None without one."""
    return None if line["rule"] == "all_to_all" else line["target"]


def _counts(lines: Sequence[Mapping[str, Any]], judge: Judge, bounds: str) -> Iterator[str]:
    clean = [judge(line) for line in lines if line["attack"] is None]
    attacked = [(_target(line), judge(line)) for line in lines if line["attack"] is not None]
    if not lines:
        return
    yield (
        f"| bounds {bounds} | {len(attacked)} attacked: suspicious | with the right target | "
        f"{len(clean)} clean: suspicious |"
    )
    yield "|---|---|---|---|"
    tests = [verdict.test for verdict in judge(lines[0])]

    def row(name: str, chosen: Sequence[str]) -> str:
        def alarms(said: Sequence[Verdict]) -> list[Verdict]:
            return [each for each in said if each.test in chosen and each.state == "suspicious"]

        found = sum(bool(alarms(said)) for _, said in attacked)
        right = sum(
            target is not None and any(v.target == target for v in alarms(said))
            for target, said in attacked
        )
        false = sum(bool(alarms(said)) for said in clean)
        return f"| {name} | {found} | {right} | {false} |"

    yield from (row(name, [name]) for name in tests)
    yield row("any of them", tests)


def main(args: Sequence[str] | None = None) -> None:
    """Adds runs to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="store_const", const="set", default="checked")
    arguments = parser.parse_args(args)
    for folder in arguments.runs:
        line = measure(folder, arguments.set)
        lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
        others = [old for old in lines if old["run"] != line["run"]]
        write_text(arguments.out, json.dumps([*others, line]) + "\n")
    print(markdown(json.loads(arguments.out.read_text())), end="")


if __name__ == "__main__":
    main()
