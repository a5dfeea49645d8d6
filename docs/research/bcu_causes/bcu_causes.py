"""Why BCU at its published ratios cleanses one victim and leaves the backdoor of another.

    python docs/research/bcu_causes/bcu_causes.py --out record.json
    python docs/research/bcu_causes/bcu_causes.py --table docs/research/bcu_causes/record.json \
        --doc docs/research/bcu_causes/README.md --method docs/methods/bcu.md

One factor at a time around a base cell, and the pairs of factors that matter, on scikit-learn's
digits. Evaluated on held-out training images, never on the test set. Finished rows are not run
again; several processes may write to one file, each with seeds of its own.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bcu_design import Cell, Victim, design
from bcu_mechanism import (
    AblatedBCU,
    Probes,
    by_group,
    cosine,
    distillation_losses,
    fresh_over_trained,
    make_probes,
    scores,
    target_margin,
    teacher_facts,
    travelled,
    with_clean_statistics,
)
from lightning import seed_everything
from lightning.pytorch import LightningModule, Trainer

from bdclean.attacks import BadNets
from bdclean.backbones import SplitModel, load_model, save_model
from bdclean.callbacks import ExactResume
from bdclean.data import Digits
from bdclean.data.splits import Splits
from bdclean.errors import DataError
from bdclean.files import write_text
from bdclean.modules import Recipe
from bdclean.training import Supervised

RECIPE = ("epochs", "lr", "batch_size", "augmentation")  # of `Cleansing`
_START, _END = "<!-- bcu causes -->\n", "<!-- end bcu causes -->"


# ---------------------------------------------------------------------- one run


def make_data(victim: Victim, seed: int) -> Digits:
    """900 digits to train on (poisoned), 300 for the defender, 200 to evaluate on."""
    attack = BadNets(target=0, rate=victim.rate, position=victim.position, seed=seed)
    return Digits(attack=attack, splits=Splits(defense=300, val=200, seed=seed))


def data_hashes(data: Digits) -> dict[str, str]:
    """Of the split and of the poison plan."""
    return {"split": data.rows.hash, "plan": data.plan.hash if data.plan is not None else ""}


def fit(module: LightningModule, data: Digits, seed: int, epochs: int = -1) -> None:
    """Trains under a Trainer that writes nothing."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[ExactResume()],
    )
    trainer.fit(module, datamodule=data)


def victim_file(victim: Victim, data: Digits, seed: int, folder: Path) -> Path:
    """The weights of the victim, trained if they are not in `folder` yet.

    The name covers the rows and the poison it was trained on, too: with another draw of the
    split the held-out images would be among them.
    """
    made_of = [asdict(victim), seed, data_hashes(data)]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = folder / f"{name}.safetensors"
    if not path.is_file():

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                parameters, victim.lr, momentum=0.9, weight_decay=victim.weight_decay
            )

        module = Supervised(
            data.facts,
            width=victim.width,
            batch_size=victim.batch_size,
            augmentation=victim.augmentation,
            optimizer=optimizer,
            schedule=victim.schedule,
        )
        fit(module, data, seed, victim.epochs)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(module.model, path)
    return path


def run_cell(cell: Cell, seed: int, victims: Path) -> dict[str, Any]:
    """Trains the victim if need be, cleanses it, and measures.

    Args:
        cell: The setting.
        seed: Of split, attack, training, and re-initialisation.
        victims: Folder of victims already trained.

    Returns:
        A JSON-ready row; see `measure`.
    """
    start = time.process_time()
    data = make_data(cell.victim, seed)
    weights = victim_file(cell.victim, data, seed, victims)
    settings = asdict(cell.bcu)
    scales = {key: settings.pop(key) for key in ("weight_scale", "fresh_scale", "norm")}
    recipe = Recipe(**{key: settings.pop(key) for key in RECIPE})
    settings |= {"facts": data.facts, "weights": str(weights), "reinit_seed": seed}
    bcu = AblatedBCU(settings | {"recipe": recipe}, **scales)
    if cell.distil:
        fit(bcu, data, seed)
    else:
        bcu.model = bcu.make_student(bcu.source.load())
    cost = {"cpu_seconds": time.process_time() - start}
    row = key_of(cell, seed) | measure(bcu, load_model(weights), make_probes(data), seed)
    return {name: _rounded(value) for name, value in (row | cost).items()}


def measure(bcu: AblatedBCU, suspect: SplitModel, probes: Probes, seed: int) -> dict[str, Any]:
    """All that a row holds beside its key.

    Returns:
        `victim`, `victim_clean_bn` (the victim with batch norm estimated anew on the defender's
        images), `start` and `start_clean_bn` (the student before training, likewise) and `bcu`:
        see `scores`. `teacher`: margins and confidence. `start_margin` (of `start_clean_bn`) and
        `end_margin`: the target's margin in the student. By stage group: `fresh_over_trained`
        (spread of the weights), `start_cosine` (start and victim), `travelled` (relative distance
        from start to end), `end_cosine` (end and victim). `loss`: distillation loss at the end,
        temperature 1.
    """
    clean_bn = {
        "victim_clean_bn": with_clean_statistics(suspect, probes.defense),
        "start_clean_bn": with_clean_statistics(bcu.start, probes.defense),
    }
    models = {"victim": suspect, "start": bcu.start, "bcu": bcu.model} | clean_bn
    scale = bcu.fresh_scale / bcu.weight_scale
    return {
        **{name: scores(model, probes) for name, model in models.items()},
        "teacher": teacher_facts(suspect, probes),
        "start_margin": target_margin(clean_bn["start_clean_bn"], probes),
        "end_margin": target_margin(bcu.model, probes),
        "fresh_over_trained": fresh_over_trained(suspect, seed, scale),
        "start_cosine": by_group(cosine, bcu.start, suspect),
        "travelled": by_group(travelled, bcu.model, bcu.start),
        "end_cosine": by_group(cosine, bcu.model, suspect),
        "loss": distillation_losses(bcu.model, suspect, probes),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


# ---------------------------------------------------------------------- rows in a file


def key_of(cell: Cell, seed: int) -> dict[str, Any]:
    """What tells a row from all others."""
    settings = {"victim_settings": asdict(cell.victim), "bcu_settings": asdict(cell.bcu)}
    name = {"factor": cell.factor, "level": cell.level, "seed": seed, "distil": cell.distil}
    return name | settings | {"data": data_hashes(make_data(cell.victim, seed))}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist.

    Raises:
        DataError: If it is not a list of rows.
    """
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())
    if not isinstance(rows, list):
        raise DataError(f"{path}: it must hold a JSON list, one row for each run.")
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Adds one row, whatever other processes have written meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [*read_rows(path), row]
        write_text(path, "[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]\n")


def run(cells: Sequence[Cell], seeds: Sequence[int], out: Path, victims: Path) -> int:
    """Runs what `out` does not hold yet, seed by seed; returns how many runs that were."""
    count = 0
    for seed in seeds:
        for cell in cells:
            key = key_of(cell, seed)
            if any(key.items() <= row.items() for row in read_rows(out)):
                continue
            row = run_cell(cell, seed, victims)
            add_row(out, row)
            count += 1
            print(
                f"{cell.factor} {cell.level} seed {seed}: victim {row['victim']}, start "
                f"{row['start_clean_bn']}, BCU {row['bcu']}, {row['cpu_seconds']:.0f} s",
                flush=True,
            )
    return count


# ---------------------------------------------------------------------- the table

_SHORT = ("BCU ACC / ASR / PA", "cosine at start", "distance travelled")


def markdown(rows: Sequence[dict[str, Any]], *, short: bool = False) -> str:
    """One line per cell, means over its seeds; the weights' columns are of the last group.

    Args:
        rows: Of a file; at least one.
        short: Four columns, for the page of the method, instead of all.
    """
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["factor"], row["level"]), []).append(row)
    order = {(cell.factor, cell.level): place for place, cell in enumerate(design())}
    lines = []
    for name in sorted(cells, key=lambda name: order.get(name, len(order))):
        all_columns = dict(zip(("factor", "level"), name, strict=True)) | _line(cells[name])
        lines.append(_shortened(all_columns) if short else all_columns)
    head = ["| " + " | ".join(lines[0]) + " |", "|---" * len(lines[0]) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(line.values())} |" for line in lines)]) + "\n"


def _shortened(line: dict[str, str]) -> dict[str, str]:
    changed = f"{line['factor']}: {line['level']}" if line["level"] else line["factor"]
    return {"changed": changed} | {name: line[name] for name in _SHORT}


def _line(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    def mean(*path: str, digits: int = 1) -> str:
        values: list[Any] = list(rows)
        for key in path:
            values = [value[key] for value in values]
        return f"{statistics.mean(values):.{digits}f}"

    def triple(model: str, *metrics: str) -> str:
        return " / ".join(mean(model, metric) for metric in metrics)

    by_seed = sorted(rows, key=lambda row: row["seed"])
    return {
        "seeds": str(len(rows)),
        "victim ACC / ASR": triple("victim", "acc", "asr"),
        "re-drawn, clean BN: ACC / ASR / untriggered": triple(
            "start_clean_bn", "acc", "asr", "untriggered"
        ),
        "BCU ACC / ASR / PA": triple("bcu", "acc", "asr", "pa"),
        "BCU ASR by seed": ", ".join(f"{row['bcu']['asr']:.0f}" for row in by_seed),
        "fresh/trained std": mean("fresh_over_trained", "group4", digits=2),
        "cosine at start": mean("start_cosine", "group4", digits=2),
        "distance travelled": mean("travelled", "group4", digits=2),
        "cosine at end": mean("end_cosine", "group4", digits=2),
        "KL triggered": mean("loss", "triggered", digits=2),
        "margin: victim, start, end": ", ".join(
            (mean("teacher", "margin"), mean("start_margin"), mean("end_margin"))
        ),
    }


def into_document(document: Path, table: str) -> None:
    """Replaces what stands between the markers of a page.

    Raises:
        DataError: If the page has no markers.
    """
    text = document.read_text()
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not start or not end:
        raise DataError(f"{document}: the lines {_START.strip()} and {_END} are missing.")
    write_text(document, f"{before}{_START}{table}{_END}{after}")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the design, or prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="JSON file of the rows, continued if it exists")
    task.add_argument("--table", type=Path, help="print the table of such a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factor", help="only the cells of this factor")
    parser.add_argument("--victims", type=Path, default=Path("runs/bcu_causes"))
    parser.add_argument("--doc", type=Path, help="page that takes the table between its markers")
    parser.add_argument("--method", type=Path, help="page that takes four of its columns")
    arguments = parser.parse_args(args)
    if arguments.table is not None:
        rows = read_rows(arguments.table)
        sys.stdout.write(markdown(rows))
        if arguments.doc is not None:
            into_document(arguments.doc, markdown(rows))
        if arguments.method is not None:
            into_document(arguments.method, markdown(rows, short=True))
        return
    cells = [cell for cell in design() if arguments.factor in (None, cell.factor)]
    if not cells:
        names = ", ".join(sorted({cell.factor for cell in design()}))
        parser.error(f"--factor {arguments.factor}: it must be one of {names}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    run(cells, arguments.seeds, arguments.out, arguments.victims)


if __name__ == "__main__":
    main()
