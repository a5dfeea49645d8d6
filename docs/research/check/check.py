"""What the label-free tests of `bdclean check` see in networks of which the truth is known.

    python docs/research/check/check.py RUN ... --out record.json

RUN is the folder of a finished fit of a classifier. A line holds where each family of perturbations
sends the answers to 500 held-out training images, drawn at random, the smallest trigger for the
backbone, the largest margins of all classes, and, for the judgement of the tests, what the run says
of the attack. A line of the same run is replaced. The tables that it prints judge all lines by the
present bounds.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdclean.backbones import load_model
from bdclean.checking import (
    Flips,
    Margins,
    SmallestTrigger,
    Verdict,
    count_flips,
    maximum_margins,
    smallest_trigger,
)
from bdclean.checking.verdicts import judge_flips, judge_margins, judge_trigger, p_value
from bdclean.commands.check import some_of
from bdclean.files import write_text
from bdclean.runs import RunFolder

IMAGES = 500


def measure(folder: Path) -> dict[str, Any]:
    """The line of a run."""
    run = RunFolder(folder)
    data, record = run.make_data(), run.read_record()
    model = load_model(folder / "model.safetensors").eval()
    held = data.role_images("defense", labels=False)
    images = some_of(held.everything()["image"], model.info.input_size, IMAGES)
    began = time.monotonic()
    found = list(count_flips(model, images))
    between = time.monotonic()
    trigger = smallest_trigger(model, images)
    after = time.monotonic()
    margins = asdict(maximum_margins(model))
    return {
        "run": folder.name,
        "data": Path(data.root).name if data.name == "folder" else data.name,
        "arch": model.info.arch,
        "width": model.info.width,
        "seed": record["seed"],
        "attack": None if data.attack is None else type(data.attack).__name__,
        "target": getattr(data.attack, "target", None),
        "metrics": {k: record["metrics"].get(k) for k in ("acc", "asr", "pa")},
        "flips": [asdict(each) for each in found],
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


def shown(verdict: Verdict) -> str:
    """A cell: the statistic, in bold where it is suspicious, and the class that it points to."""
    told = verdict.statistics or {}
    if verdict.test == "MM-BD":
        cell = f"p {p_value(told['p'])}"
    elif verdict.test == "DECREE":
        cell = f"{100 * told['share']:.1f}" if told else "-"
    else:
        cell = f"{100 * told['piled']:.0f}"
    if verdict.state != "suspicious":
        return cell
    return f"**{cell}**" if verdict.target is None else f"**{cell}** ({verdict.target})"


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """All networks, and how many each test finds suspicious."""
    judged = [(line, verdicts(line)) for line in lines]
    tests = [verdict.test for verdict in judged[0][1]]
    head = ["data", "network", "seed", "attack", "target", "ACC", "ASR", *tests]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line, said in sorted(judged, key=lambda each: each[0]["attack"] is not None):
        network = f"{line['arch']}, width {line['width']}"
        asr = line["metrics"]["asr"]
        rates = [f"{line['metrics']['acc']:.1f}", "-" if asr is None else f"{asr:.1f}"]
        attack = [line["attack"] or "none", "-" if line["target"] is None else str(line["target"])]
        cells = [line["data"], network, str(line["seed"]), *attack, *rates, *map(shown, said)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", *_counts(judged, tests)]) + "\n"


def _counts(
    judged: Sequence[tuple[Mapping[str, Any], Sequence[Verdict]]], tests: Sequence[str]
) -> Iterator[str]:
    clean = [said for line, said in judged if line["attack"] is None]
    attacked = [(line["target"], said) for line, said in judged if line["attack"] is not None]
    yield (
        f"| test | {len(attacked)} attacked: suspicious | with the right target | "
        f"{len(clean)} clean: suspicious |"
    )
    yield "|---|---|---|---|"

    def row(name: str, chosen: Sequence[str]) -> str:
        def alarms(said: Sequence[Verdict]) -> list[Verdict]:
            return [each for each in said if each.test in chosen and each.state == "suspicious"]

        found = sum(bool(alarms(said)) for _, said in attacked)
        right = sum(any(v.target == target for v in alarms(said)) for target, said in attacked)
        false = sum(bool(alarms(said)) for said in clean)
        return f"| {name} | {found} | {right} | {false} |"

    yield from (row(name, [name]) for name in tests)
    yield row("any of them", tests)


def main(args: Sequence[str] | None = None) -> None:
    """Adds runs to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(args)
    for folder in arguments.runs:
        line = measure(folder)
        lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
        others = [old for old in lines if old["run"] != line["run"]]
        write_text(arguments.out, json.dumps([*others, line]) + "\n")
    print(markdown(json.loads(arguments.out.read_text())), end="")


if __name__ == "__main__":
    main()
