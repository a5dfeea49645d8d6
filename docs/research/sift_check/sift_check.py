"""What a sift of an exported attack found, beside the truth that the export keeps.

    bdclean attack export ... --out EXPORTED
    bdclean sift EXPORTED --run RUN
    python docs/research/sift_check/sift_check.py EXPORTED RUN --out record.json

The record is RUN/result.json with `identification` compared with EXPORTED/rows.csv, and with ACC,
ASR and PA of the model on EXPORTED/test and EXPORTED/test_triggered. Sifting reads none of them.
`--weights suspect.safetensors` measures another network of the run, here the first one; that
record has no findings and no seconds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.backbones import SplitModel, load_model
from bdclean.data.layout import class_folders
from bdclean.data.sources import read_class_folder
from bdclean.errors import DataError
from bdclean.files import write_text
from bdclean.metrics.identification import identification
from bdclean.runs import RunFolder
from bdclean.tabular import read_csv
from bdclean.types import Findings, TrainingSet


def compare(exported: Path, run: Path) -> dict[str, Any]:
    """Compares `suspects.csv` of a sift with the rows that were poisoned.

    Args:
        exported: Folder of `bdclean attack export`.
        run: Folder of the sift.

    Returns:
        See `identification`; without rounds, of which `suspects.csv` says nothing.

    Raises:
        DataError: If the run did not sift these images, or flagged nothing yet.
    """
    truth = {row["file"]: row for row in read_csv(exported / "rows.csv")}
    found = read_csv(RunFolder(run).suspects)
    files = [f"train/{row['file'].removeprefix('train/')}" for row in found]
    if set(files) != truth.keys() or len(files) != len(truth):
        raise DataError(f"{run} is not a sift of {exported}: suspects.csv names other files.")
    if "" in {row["flagged"] for row in found}:
        raise DataError(f"{run} has scored and flagged nothing; sift without --dry-run.")

    def column(rows: Sequence[dict[str, str]], key: str) -> Tensor:
        return torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)

    known = [truth[file] for file in files]
    labels = column(found, "label").long()
    none = torch.zeros(0, len(files), dtype=torch.bool)
    # In the order of the suspects: nothing that is counted depends on it.
    findings = Findings(
        score=column(found, "score"),
        flagged=column(found, "flagged").bool(),
        proposed=labels,
        further={},
        rounds=none,
        round_epochs=torch.zeros(0, dtype=torch.int64),
    )
    poisoned, covers = (column(known, key).bool() for key in ("poison", "cover"))
    return identification(findings, TrainingSet(labels, tuple(files), poisoned, covers))


def measure(exported: Path, weights: Path) -> dict[str, float | int]:
    """ACC, ASR and PA, in percent, of a model on the test images of an export, and their counts."""
    model = load_model(weights)
    classes = class_folders(exported / "train")
    target = json.loads((exported / "plan.json").read_text())["target"]
    clean, truth = _predict(model, exported / "test", classes)
    triggered, own = _predict(model, exported / "test_triggered", classes)
    wanted = (own + 1) % len(classes) if target is None else target  # None: all_to_all
    return {
        "acc": _percent(clean == truth),
        "asr": _percent(triggered == wanted),
        "pa": _percent(triggered == own),
        "n_clean": len(clean),
        "n_triggered": len(triggered),
    }


def _predict(model: SplitModel, folder: Path, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Predictions and true labels; `folder` may lack some of the classes."""
    images = read_class_folder(folder, model.info.input_size)
    assert images.labels is not None  # noqa: S101
    named = torch.tensor([classes.index(name) for name in images.classes])
    model.eval()
    with torch.no_grad():
        starts = range(0, len(images), 256)
        parts = [model(images.images[i : i + 256].float() / 255).argmax(1) for i in starts]
    return torch.cat(parts), named[images.labels]


def _percent(hits: Tensor) -> float:
    return round(100 * float(hits.double().mean()), 4)


def main(args: Sequence[str] | None = None) -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("exported", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--weights", default="model.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(args)
    record = RunFolder(arguments.run).read_record()
    found = compare(arguments.exported, arguments.run)
    record["metrics"] = measure(arguments.exported, arguments.run / arguments.weights)
    if arguments.weights == "model.safetensors":
        record["identification"] = found
    else:
        del record["identification"]
        record["cost"]["train_seconds"] = 0.0
    write_text(arguments.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
