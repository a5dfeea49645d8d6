"""Turns run records into the tables of the documentation.

    python -m bdclean.experiments.tables docs/results --readme README.md

A table is a folder `docs/results/TABLE/ROW/ATTACK-sSEED.json` of copies of `result.json`, with
`docs/results/TABLE/about.md` as its introduction. An optional `beside.json` puts facts that no run
gives beside the attacks: {"columns": ["published"], "attacks": {"badnets": ["93.3 / 100 / 0"]}};
"badnets/ROW" in place of "badnets" is for one row of the attack.
Optional files `docs/results/TABLE/ATTACK.csv`, copies of `metrics.csv`, show how the values on
held-out images went from epoch to epoch.
Records of `tests/benchmarks` lie in `docs/results` itself. Written are `docs/results/README.md`
and the part of the readme between its result markers (the first table). `--check` writes nothing
and fails if they are not up to date.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bdclean.errors import DataError

METRICS = {"ACC": ("metrics", "acc"), "ASR": ("metrics", "asr"), "PA": ("metrics", "pa")}
FOUND = {
    "TPR": ("identification", "tpr"),
    "FPR": ("identification", "fpr"),
    "AUROC": ("identification", "auroc"),
}
_START, _END = "<!-- results -->\n", "<!-- end results -->"


@dataclass(frozen=True)
class Cell:
    """The runs of one row and attack.

    Attributes:
        records: One `result.json` per seed.
    """

    records: tuple[dict[str, Any], ...]

    def text(self, part: str, name: str) -> str:
        """Mean over the seeds and, with more than one, the sample standard deviation.

        Empty where a record has no such part, or nothing under the name in it.
        """
        values = [record.get(part, {}).get(name) for record in self.records]
        return "" if None in values else spread(values)

    @property
    def seconds(self) -> float:
        """Mean seconds of training."""
        return float(statistics.mean(r["cost"]["train_seconds"] for r in self.records))


def spread(values: Sequence[float]) -> str:
    """`mean ± sample standard deviation`, or the value alone when there is one."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def read_table(folder: Path) -> dict[str, dict[str, Cell]]:
    """Rows by name, in the order of the numbers that start their folder names, by attack.

    Raises:
        DataError: If a file name is not ATTACK-sSEED.json.
    """
    rows: dict[str, dict[str, Cell]] = {}
    for row in sorted(path for path in folder.iterdir() if path.is_dir()):
        records: dict[str, list[dict[str, Any]]] = {}
        for file in sorted(row.glob("*.json")):
            named = re.fullmatch(r"(.+)-s(\d+)", file.stem)
            if named is None:
                raise DataError(f"{file}: records are named ATTACK-sSEED.json.")
            records.setdefault(named[1], []).append(json.loads(file.read_text()))
        rows[re.sub(r"^\d+-", "", row.name)] = {a: Cell(tuple(r)) for a, r in records.items()}
    return rows


def read_beside(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names and, by attack, contents of the further columns of a table; empty without a file.

    Raises:
        DataError: If an attack has another number of contents than there are names.
    """
    file = folder / "beside.json"
    if not file.is_file():
        return [], {}
    facts = json.loads(file.read_text())
    columns, attacks = facts["columns"], facts["attacks"]
    for attack, contents in attacks.items():
        if len(contents) != len(columns):
            raise DataError(f"{file}: {attack} needs one text for each of {columns}.")
    return columns, attacks


def markdown(
    rows: dict[str, dict[str, Cell]],
    columns: Sequence[str] = (),
    beside: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """One line per attack and row: labels, seeds, metrics, seconds, further columns.

    A table in which a record says what was found has TPR, FPR and AUROC, too.
    """
    cells = [cell for row in rows.values() for cell in row.values()]
    found = any("identification" in record for cell in cells for record in cell.records)
    metrics = METRICS | (FOUND if found else {})
    names = ["attack", "method", "labels", "seeds", *metrics, "seconds", *columns]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    attacks = sorted({attack for row in rows.values() for attack in row})
    for attack in attacks:
        for name, row in rows.items():
            if attack not in row:
                continue
            cell = row[attack]
            protocol = cell.records[0]["protocol"]
            labels = protocol.get("labels", "")
            if protocol.get("head") == "probe" and "probe_labels" in protocol:
                labels += f", probe: {protocol['probe_labels']}"
            values = [cell.text(*where) for where in metrics.values()]
            further = beside.get(f"{attack}/{name}", beside.get(attack, [""] * len(columns)))
            contents = [attack, name, labels, str(len(cell.records)), *values]
            lines.append(f"| {' | '.join([*contents, f'{cell.seconds:.0f}', *further])} |")
    return "\n".join(lines) + "\n"


def document(folder: Path) -> str:
    """The whole of `docs/results/README.md`."""
    parts = [
        "# Results\n\nGenerated by `python -m bdclean.experiments.tables docs/results`; "
        "do not edit. ACC, ASR and PA are percent, as mean ± sample standard deviation over "
        "seeds; seconds are those of training, evaluation apart.\n"
    ]
    for table in _tables(folder):
        about = (table / "about.md").read_text().strip()
        cells = [cell for row in read_table(table).values() for cell in row.values()]
        hours = sum(cell.seconds * len(cell.records) for cell in cells) / 3600
        parts.append(f"{about}\n\n{_table(table)}\nAll its trainings took {hours:.1f} hours.\n")
        course = courses(table)
        if course:
            parts.append(f"Held-out images during the training:\n\n{course}")
    parts.append(speeds(folder))
    return "\n".join(parts)


def courses(folder: Path) -> str:
    """Validation values by attack and epoch, from FOLDER/ATTACK.csv; empty without such a file."""
    runs = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as lines:
            runs[path.stem] = list(csv.DictReader(lines))
    keys = dict.fromkeys(
        k for run in runs.values() for line in run[:1] for k in line if k.startswith("val/")
    )
    if not keys:
        return ""
    names = [k.removeprefix("val/").replace("_", " ") for k in keys]
    text = [f"| attack | epoch | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for attack, run in runs.items():
        for line in run:
            if any(line.get(k) for k in keys):
                values = [f"{float(line[k]):.1f}" if line.get(k) else "" for k in keys]
                epoch = str(int(line["epoch"]) + 1)
                text.append(f"| {' | '.join([attack, epoch, *values])} |")
    return "\n".join(text) + "\n"


def speeds(folder: Path) -> str:
    """A section on the records of tests/benchmarks, DIR/*.json with `share_of_bare_median`."""
    lines = [
        "## Speed\n",
        "Of our training and scoring, as a share of a bare loop over the same network, measured in "
        "turns in one process (`tests/benchmarks`); medians.\n",
        "| what | width | batch | precision | threads | share |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if "share_of_bare_median" in record:
            cells = [str(record[k]) for k in ("what", "width", "batch_size", "precision")]
            cells += [str(record["threads"]), f"{record['share_of_bare_median']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(folder: Path) -> str:
    return markdown(read_table(folder), *read_beside(folder))


def _tables(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/about.md"))


def _readme(text: str, folder: Path) -> str:
    before, rest = text.split(_START)
    after = rest.split(_END)[1]
    first = _tables(folder)[0]
    about = (first / "about.md").read_text().strip().split("\n", 1)[1].strip()
    return f"{before}{_START}{about}\n\n{_table(first)}{_END}{after}"


def main(args: Sequence[str] | None = None) -> None:
    """Writes or checks the generated pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(args)
    pages = {arguments.folder / "README.md": document(arguments.folder)}
    if arguments.readme is not None:
        pages[arguments.readme] = _readme(arguments.readme.read_text(), arguments.folder)
    for path, text in pages.items():
        if not arguments.check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            sys.exit(f"{path} is not what its records give; run without --check.")


if __name__ == "__main__":
    main()
