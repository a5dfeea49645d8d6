"""The folder of results: tables of records, and what is chosen from them.

    FOLDER/results.yaml                       order of the tables, and the selections of rows
    FOLDER/TABLE/table.yaml                   title, texts, columns, attacks and rows of a table
    FOLDER/TABLE/ROW/ATTACK-sSEED.json        a copy of a run's `result.json`
    FOLDER/TABLE/ROW/ATTACK-sSEED.csv         optional: a copy of its `metrics.csv`

Records are data and nobody edits them; `table.yaml` says what they are called. Every mistake is a
`DataError` that names the file.
"""

import re
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from bdclean.errors import DataError
from bdclean.reporting.records import Record

OWN_COLUMNS = ("labels", "seeds", "seconds")  # of every table; all others are metrics or facts
_SLUG = r"[a-z0-9_]+"
_KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Cell:
    """The runs of one row and attack.

    Attributes:
        records: One for each seed.
    """

    records: tuple[Record, ...]

    def values(self, key: str) -> list[float]:
        """What the runs measured under a key; empty unless each of them did."""
        values = [record.numbers.get(key) for record in self.records]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else []

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a single run's share, in percent; None where seeds show the spread.

        It holds for this one network on images of this kind.
        """
        return self.records[0].interval(key) if len(self.records) == 1 else None

    @property
    def labels(self) -> str:
        """Which labels the method and its probe read."""
        return self.records[0].labels

    @property
    def seconds(self) -> float:
        """Mean seconds of training."""
        return statistics.mean(record.train_seconds for record in self.records)


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Attributes:
        id: Its folder.
        name: How the pages call it.
        note: A remark on it, or nothing.
        cells: The runs by attack.
        courses: By attack, `metrics.csv` of its run, where one is kept.
    """

    id: str
    name: str
    note: str
    cells: Mapping[str, Cell]
    courses: Mapping[str, Path]


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        folder: Where it is.
        title: Its heading.
        introduction: What was done; Markdown.
        discussion: What it shows; Markdown, or nothing.
        columns: `OWN_COLUMNS`, keys of metrics and names of facts, in order.
        attacks: Names of the attacks by the start of their files' names, in order.
        rows: In order.
        facts: Columns that no run gives: by name, then by `ATTACK` or `ATTACK/ROW`.
    """

    folder: Path
    title: str
    introduction: str
    discussion: str
    columns: tuple[str, ...]
    attacks: Mapping[str, str]
    rows: tuple[Row, ...]
    facts: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `table.yaml` and the records that it names.

        Args:
            folder: Of the table.

        Raises:
            DataError: If a file is wrong or missing, a row has no records, or a row, an attack or
                a column is unknown.
        """
        file = folder / "table.yaml"
        entries = _entries(
            file,
            _read_yaml(file),
            {"title": str, "introduction": str, "columns": list, "attacks": dict, "rows": list},
            {"discussion": str, "facts": dict},
        )
        attacks = entries["attacks"]
        rows = tuple(_row(folder, entry, attacks) for entry in entries["rows"])
        table = cls(
            folder,
            entries["title"],
            entries["introduction"].strip(),
            entries.get("discussion", "").strip(),
            tuple(entries["columns"]),
            attacks,
            rows,
            entries.get("facts", {}),
        )
        table._check(file)
        return table

    def row(self, row_id: str, source: Path) -> Row:
        """The row of an id.

        Args:
            row_id: Its folder.
            source: The file that asks, for the message.

        Raises:
            DataError: If there is no such row.
        """
        rows = {row.id: row for row in self.rows}
        _known(source, "row", [row_id], rows)
        return rows[row_id]

    def fact(self, column: str, attack: str, row: Row) -> str:
        """What stands in a column of facts: that of the row, else that of its attack."""
        facts = self.facts[column]
        return facts.get(f"{attack}/{row.id}", facts.get(attack, ""))

    def _check(self, file: Path) -> None:
        ids = [row.id for row in self.rows]
        repeated = {row_id for row_id in ids if ids.count(row_id) > 1}
        if repeated:
            raise DataError(f"{file}: row {min(repeated)} is there twice.")
        folders = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
        _known(file, "row", folders, ids)
        for attack in self.attacks:
            if not any(attack in row.cells for row in self.rows):
                raise DataError(f"{file}: attack {attack} has no records.")
        measured = {
            key
            for row in self.rows
            for cell in row.cells.values()
            for record in cell.records
            for key in record.numbers
        }
        _known(file, "column", self.columns, [*OWN_COLUMNS, *sorted(measured), *self.facts])
        for column, facts in self.facts.items():
            _known(file, "column", [column], self.columns)
            for place in _entries(file, facts, {}, dict.fromkeys(facts, str)):
                attack, _, row_id = place.partition("/")
                _known(file, "attack", [attack], self.attacks)
                _known(file, "row", [row_id] if row_id else [], ids)


@dataclass(frozen=True)
class Selection:
    """Rows of one table, side by side over attacks.

    Attributes:
        table: Where they come from.
        text: What a reader must know; Markdown.
        attacks: The attacks by the heads of their columns.
        values: Keys of the numbers of a cell.
        rows: In order.
    """

    table: Table
    text: str
    attacks: Mapping[str, str]
    values: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Results:
    """All results.

    Attributes:
        folder: Where they are.
        title: Heading of the summary.
        introduction: Its first lines; Markdown.
        tables: In order.
        summary: Selections of the summary.
        pages: What stands between the result markers of other pages, such as the README.
    """

    folder: Path
    title: str
    introduction: str
    tables: tuple[Table, ...]
    summary: tuple[Selection, ...]
    pages: Mapping[Path, Selection]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `results.yaml` and all tables.

        Args:
            folder: Of the results.

        Raises:
            DataError: If a file is wrong or missing, or a table is not named in `results.yaml`.
        """
        file = folder / "results.yaml"
        wanted = {"title": str, "introduction": str, "tables": list, "summary": list}
        entries = _entries(file, _read_yaml(file), wanted | {"pages": dict})
        present = sorted(path.parent.name for path in folder.glob("*/table.yaml"))
        _known(file, "table", present, entries["tables"])
        tables = {name: Table.read(folder / name) for name in entries["tables"]}
        return cls(
            folder,
            entries["title"],
            entries["introduction"].strip(),
            tuple(tables.values()),
            tuple(_selection(file, entry, tables) for entry in entries["summary"]),
            {folder / page: _selection(file, e, tables) for page, e in entries["pages"].items()},
        )


def _row(folder: Path, entry: Any, attacks: Mapping[str, str]) -> Row:
    file = folder / "table.yaml"
    entry = _entries(file, entry, {"id": str, "name": str}, {"note": str})
    place = folder / entry["id"]
    records: dict[str, list[Record]] = {}
    courses: dict[str, Path] = {}
    for path in sorted(place.glob("*")):
        named = re.fullmatch(rf"({_SLUG})-s(\d+)\.(json|csv)", path.name)
        if named is None:
            raise DataError(f"{path}: records are named ATTACK-sSEED.json, in small letters.")
        _known(file, "attack", [named[1]], attacks)
        if named[3] == "csv":
            courses[named[1]] = path
            continue
        record = Record.read(path)
        if record.seed is not None and record.seed != int(named[2]):
            raise DataError(f"{path}: the seed in the record is {record.seed}.")
        records.setdefault(named[1], []).append(record)
    if not records:
        raise DataError(f"{file}: row {entry['id']} has no records in {place}.")
    cells = {attack: Cell(tuple(records[attack])) for attack in attacks if attack in records}
    return Row(entry["id"], entry["name"], entry.get("note", ""), cells, courses)


def _selection(file: Path, entry: Any, tables: Mapping[str, Table]) -> Selection:
    wanted = {"table": str, "text": str, "attacks": dict, "values": list, "rows": list}
    entry = _entries(file, entry, wanted)
    _known(file, "table", [entry["table"]], tables)
    table = tables[entry["table"]]
    _known(file, "attack", entry["attacks"].values(), table.attacks)
    _known(file, "value", entry["values"], [c for c in table.columns if c not in OWN_COLUMNS])
    rows = tuple(table.row(row_id, file) for row_id in entry["rows"])
    return Selection(table, entry["text"].strip(), entry["attacks"], tuple(entry["values"]), rows)


def _entries(
    file: Path, found: Any, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Checks the keys of a mapping and the types of its values."""
    wanted = {**required, **(optional or {})}
    if not isinstance(found, dict):
        raise DataError(f"{file}: {found!r} must be a mapping, with {', '.join(wanted)}.")
    _known(file, "key", found, wanted)
    for key in required:
        if key not in found:
            raise DataError(f"{file}: the key {key} is missing.")
    for key, value in found.items():
        if not isinstance(value, wanted[key]):
            raise DataError(f"{file}: {key} must be {_KINDS[wanted[key]]}, not {value!r}.")
    return found


def _known(file: Path, what: str, names: Collection[Any], known: Collection[Any]) -> None:
    """Refuses names that are not known."""
    for name in names:
        if name not in known:
            raise DataError(
                f"{file}: unknown {what} {name!r}; known: {', '.join(map(str, known))}."
            )


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
