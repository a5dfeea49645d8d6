"""What the tiers of a sift hold, beside the truth, and whether the class that it names is right.

    python docs/research/sift_tiers/sift_tiers.py RUN --set BadNets --use design \
        --truth EXPORTED --out docs/research/sift_tiers/record.json

RUN is the folder of a sift, EXPORTED that of `bdclean attack export`; without `--truth` the images
count as clean. The tiers are computed from the flags and the proposed labels in `suspects.csv`, so
that files without the column `tier` will do. `--use` says whether the set was looked at when the
rule was chosen (`design`) or not (`check`). A line of the same set is replaced.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.errors import DataError
from bdclean.files import write_text
from bdclean.functional.tiers import LIKELY, POSSIBLE, compare_classes, tiers_of
from bdclean.metrics.identification import precision, true_positive_rate
from bdclean.runs import RunFolder
from bdclean.tabular import read_csv
from bdclean.types import Findings

KINDS = (6, 7, 8, 9)
DRAWS = 200


def judge(suspects: Path, truth: Path | None) -> dict[str, Any]:
    """Counts what each tier holds.

    Args:
        suspects: `suspects.csv` of a run that proposed labels.
        truth: `rows.csv` of the export; None where nothing is poisoned.

    Raises:
        DataError: If the run flagged nothing yet, or the truth is about other files.
    """
    lines = read_csv(suspects)
    if any(line["flagged"] == "" for line in lines):
        raise DataError(f"{suspects}: the run scored samples and flagged none.")
    labels = torch.tensor([int(line["label"]) for line in lines])
    flagged = torch.tensor([line["flagged"] == "1" for line in lines])
    proposed = torch.tensor([int(line["proposed"] or -1) for line in lines])
    poisoned, target = _truth(lines, truth, labels)
    none = torch.zeros(0, len(lines))
    tiers = tiers_of(Findings(none, flagged, proposed, {}, none.bool(), none), labels)
    standing = compare_classes(labels, flagged, proposed)
    groups = {"flagged": flagged, "likely": tiers == LIKELY, "possible": tiers == POSSIBLE}
    first = min(range(len(standing.chance)), key=standing.chance.__getitem__)
    return {
        "n": len(lines),
        "n_poisoned": int(poisoned.sum()),
        "target": target,
        "attacked": standing.attacked,
        "first": first,
        "chance": standing.chance[first],
        "evenness": round(standing.evenness[first], 3),
        "renamed": list(standing.renamed),
        "kinds": list(standing.kinds),
        **{name: _rates(mask, poisoned) for name, mask in groups.items()},
        "fewer": fewer_classes(labels, flagged, proposed, target),
    }


def fewer_classes(
    labels: Tensor, flagged: Tensor, proposed: Tensor, target: int | None
) -> dict[str, dict[str, int]]:
    """What is named if only some of the classes are looked at, drawn `DRAWS` times.

    Samples of the other classes, and samples that are named as one of them, are left out. The
    target is always among the classes, where there is one.

    Args:
        labels: (N,).
        flagged: (N,), bool.
        proposed: (N,); -1 where nothing is proposed.
        target: Of the attack; None where there is none.

    Returns:
        By the number of classes: in how many draws the target or another class was named.
    """
    present, draw = labels.unique().tolist(), random.Random(0)  # noqa: S311
    others, told = [k for k in present if k != target], {}
    for kinds in KINDS:
        named = []
        for _ in range(DRAWS if kinds < len(present) else 0):
            more = draw.sample(others, kinds - (target is not None))
            chosen = torch.tensor(sorted([*more, *([] if target is None else [target])]))
            kept = torch.isin(labels, chosen) & (~flagged | torch.isin(proposed, chosen))
            places = [torch.searchsorted(chosen, part[kept]) for part in (labels, proposed)]
            places[1][proposed[kept] < 0] = -1
            found = compare_classes(places[0], flagged[kept], places[1]).attacked
            named.append(None if found is None else int(chosen[found]))
        right = sum(name is not None and name == target for name in named)
        wrong = sum(name is not None and name != target for name in named)
        told[str(kinds)] = {"draws": len(named), "right": right, "wrong": wrong}
    return told


def _truth(
    lines: Sequence[dict[str, str]], truth: Path | None, labels: Tensor
) -> tuple[Tensor, int | None]:
    """Which samples are poisoned, (N,), bool, and the class that all of them show, if there is."""
    if truth is None:
        return torch.zeros(len(lines), dtype=torch.bool), None
    known = {row["file"].removeprefix("train/"): row["poison"] == "1" for row in read_csv(truth)}
    files = [line["file"].removeprefix("train/") for line in lines]
    if set(files) != known.keys():
        raise DataError(f"{truth} is not about the files of the run.")
    poisoned = torch.tensor([known[file] for file in files])
    shown = labels[poisoned].unique().tolist()
    return poisoned, shown[0] if len(shown) == 1 else None


def _rates(mask: Tensor, poisoned: Tensor) -> dict[str, Any]:
    """How many, and precision and recall in percent; None where there is nothing to divide by."""
    count, total = int(mask.sum()), int(poisoned.sum())
    return {
        "n": count,
        "precision": round(precision(mask, poisoned), 2) if count else None,
        "recall": round(true_positive_rate(mask, poisoned), 2) if total else None,
    }


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """One line per set."""
    head = (
        *("set", "use", "images", "poisoned", "class named", "chance, evenness"),
        *("flagged: P / R", "likely: P / R", "possible: P / R"),
    )
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        cells = [line["set"], line["use"], f"{line['n']:,}", str(line["n_poisoned"])]
        cells += [_named(line), f"{line['chance']:.0e}, {line['evenness']:.2f}"]
        cells += [_cell(line[name]) for name in ("flagged", "likely", "possible")]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def markdown_of_fewer(lines: Sequence[dict[str, Any]]) -> str:
    """One line per set: of the draws of so many classes, those that named the target, or another.

    Sets with no target can only name a wrong class.
    """
    text = [
        f"| set | {' | '.join(f'{k} classes' for k in KINDS)} |",
        "|---" * (1 + len(KINDS)) + "|",
    ]
    for line in lines:
        counts = [line["fewer"][str(k)] for k in KINDS]
        cells = [f"{c['right']} right, {c['wrong']} wrong of {c['draws']}" for c in counts]
        text.append(f"| {line['set']} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _named(line: dict[str, Any]) -> str:
    if line["attacked"] is None:
        return "none" if line["n_poisoned"] else "none (right)"
    return "right" if line["attacked"] == line["target"] else "**wrong**"


def _cell(rates: dict[str, Any]) -> str:
    if not rates["n"]:
        return "0"
    if rates["recall"] is None:
        return str(rates["n"])
    return f"{rates['n']}: {rates['precision']:.0f} / {rates['recall']:.0f}"


def main(args: Sequence[str] | None = None) -> None:
    """Adds a run to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", required=True, help="Name of the set in the table.")
    parser.add_argument("--use", choices=("design", "check"), required=True)
    parser.add_argument("--truth", type=Path, help="Folder of the export; clean without it.")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(args)
    truth = None if arguments.truth is None else arguments.truth / "rows.csv"
    line = {"set": arguments.set, "use": arguments.use}
    line |= judge(RunFolder(arguments.run).suspects, truth)
    lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    lines = [one for one in lines if one["set"] != line["set"]] + [line]
    write_text(arguments.out, json.dumps(lines, indent=2) + "\n")
    print(markdown_of_fewer(lines), markdown(lines), sep="\n", end="")


if __name__ == "__main__":
    main()
