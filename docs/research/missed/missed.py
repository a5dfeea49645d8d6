"""What a defence finds of the poisoned samples, by how much the trigger changes their images.

    python docs/research/missed/missed.py RUN --row AdvrBD --out docs/research/missed/record.json

RUN is a folder of `bdclean fit` with an attack and a method that flags samples. The change of an
image is the mean over the attack's footprint, in grey levels (0 to 255): over the channels and
pixels that the attack changes in some poisoned sample. For a patch this is the patch, for a blend
the whole image. A line of the same attack, row and seed is replaced.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.data import ImageDataModule
from bdclean.errors import DataError
from bdclean.files import write_text
from bdclean.metrics.identification import true_positive_rate
from bdclean.runs import RunFolder
from bdclean.tabular import read_csv

BOUNDS = (32.0, 64.0)  # an eighth and a quarter of the scale
_KEY = ("attack", "row", "seed")


def trigger_change(clean: Tensor, poisoned: Tensor) -> Tensor:
    """How much a trigger changes each image, in grey levels.

    Args:
        clean: (P, C, H, W), uint8.
        poisoned: The same images with the trigger.

    Returns:
        (P,) float64: the mean absolute change over the footprint, the values that change in some
        image; 0 where nothing changes at all.
    """
    change = (poisoned.int() - clean.int()).abs()
    footprint = (change > 0).any(0)
    return change.sum((1, 2, 3)).double() / max(1, int(footprint.sum()))


def by_change(change: Tensor, flagged: Tensor, bounds: Sequence[float]) -> list[dict[str, Any]]:
    """TPR of poisoned samples in groups by the change of their images.

    Args:
        change: (P,), see `trigger_change`.
        flagged: (P,), bool.
        bounds: Ascending grey levels; a group ends below each, and the last has no end.

    Returns:
        A group each: `from`, `below` (None: no end), `n` and `tpr` (None: no sample).
    """
    groups = []
    for low, high in zip([0.0, *bounds], [*bounds, torch.inf], strict=True):
        chosen = (change >= low) & (change < high)
        rate = true_positive_rate(flagged, chosen)
        groups.append(
            {
                "from": low,
                "below": None if high == torch.inf else high,
                "n": int(chosen.sum()),
                "tpr": round(rate, 4) if chosen.any() else None,
            }
        )
    return groups


def missed(folder: Path, bounds: Sequence[float] = BOUNDS) -> dict[str, Any]:
    """The groups of one run, and what tells it from others.

    Args:
        folder: Of the run.
        bounds: See `by_change`.

    Raises:
        ConfigError: If it is no run.
        DataError: If it has no fixed poisoned samples, it flagged nothing, or the data
            are no longer the same.
    """
    run = RunFolder(folder)
    data = run.make_data()
    plan = data.plan
    if plan is None or data.attack is None or data.attack.dynamic:
        raise DataError(f"{folder}: its attack poisons no fixed samples.")
    made_by = run.read_record()
    if made_by["data"].get("plan_hash") != plan.hash:
        raise DataError(f"{folder}: its data poison other samples now than they did in the run.")
    flagged = _flagged(run.suspects, plan.num_samples)[plan.poison_index]
    return {
        "attack": type(data.attack).__name__,
        "seed": made_by["seed"],
        "groups": by_change(_changes(data, plan.poison_index), flagged, bounds),
    }


def _changes(data: ImageDataModule, rows: Tensor) -> Tensor:
    images = data.poisoned_set.role("train")
    return trigger_change(images.clean(rows), images.shown(rows))


def _flagged(suspects: Path, count: int) -> Tensor:
    """(N,), bool, by row of the training set."""
    flagged = torch.zeros(count, dtype=torch.bool)
    for line in read_csv(suspects):
        if not line["flagged"]:
            raise DataError(f"{suspects}: the run scored samples and flagged none.")
        flagged[int(line["index"])] = line["flagged"] == "1"
    return flagged


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """One line per run; in each group the TPR and, in brackets, the number of samples."""
    groups = lines[0]["groups"]
    names = [
        f"from {g['from']:g}" if g["below"] is None else f"{g['from']:g} to {g['below']:g}"
        for g in groups
    ]
    text = [f"| attack | method | seed | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for line in lines:
        rates = ["" if g["tpr"] is None else f"{g['tpr']:.1f} ({g['n']})" for g in line["groups"]]
        cells = [line["attack"], line["row"], str(line["seed"]), *rates]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Adds a run to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--row", required=True, help="Name of the method in the table.")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(args)
    line = {"row": arguments.row} | missed(arguments.run)
    lines = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    lines = [one for one in lines if any(one[key] != line[key] for key in _KEY)] + [line]
    write_text(arguments.out, json.dumps(lines, indent=2) + "\n")
    print(markdown(lines), end="")


if __name__ == "__main__":
    main()
