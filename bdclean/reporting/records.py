"""A run and its record as values. Files are read here and never written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bdclean.errors import DataError
from bdclean.metrics.functional import wilson_interval
from bdclean.runs import RunFolder, read_record

_PARTS = ("metrics", "protocol", "cost")
_COUNTS = {"acc": "n_clean", "asr": "n_triggered", "pa": "n_triggered"}
"""The images that a share counts, in records from before they held intervals."""


@dataclass(frozen=True)
class Record:
    """The content of a `result.json` or `test.json`.

    Attributes:
        path: Where it was read.
        content: The JSON object.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and checks a record.

        Args:
            path: The JSON file.

        Raises:
            DataError: If the file is missing, is not the record of a run, or is of a newer form.
        """
        content = read_record(path)
        absent = [part for part in _PARTS if not isinstance(content.get(part), dict)]
        if absent:
            raise DataError(f"{path} is not a record of a run: it lacks {', '.join(absent)}.")
        return cls(path, content)

    @property
    def schema(self) -> int:
        """The form of the file; 0 for records from before there was a number."""
        return int(self.content["schema"])

    @property
    def seed(self) -> int | None:
        """The global seed, if the run had one."""
        return self.content.get("seed")

    @property
    def numbers(self) -> dict[str, float | None]:
        """What was measured, by key: metrics with their counts, then what was found.

        None is a number that is not defined, such as the TPR where nothing is poisoned.
        """
        found = self.content.get("identification", {})
        both = {**found, **self.content["metrics"]}
        return {key: value for key, value in both.items() if not isinstance(value, (dict, list))}

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a share, in percent (Wilson); None where no images were counted."""
        kept = self.content.get("intervals", {}).get(key)
        if kept is not None:
            return float(kept[0]), float(kept[1])
        metrics = self.content["metrics"]
        value, count = metrics.get(key), metrics.get(_COUNTS.get(key, ""))
        if value is None or not count:
            return None
        return wilson_interval(round(value / 100 * count), count)

    @property
    def labels(self) -> str:
        """Which labels the method and its probe read."""
        protocol = self.content["protocol"]
        labels = str(protocol.get("labels", ""))
        if protocol.get("head") == "probe" and "probe_labels" in protocol:
            labels += f", probe: {protocol['probe_labels']}"
        return labels

    @property
    def train_seconds(self) -> float:
        """Seconds of training, without evaluation; 0 where nothing was trained."""
        return float(self.content["cost"].get("train_seconds", 0.0))


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not.

    Attributes:
        folder: What lies where in it.
        config: The merged configuration; empty where the folder has none.
        record: What the fit recorded; None before it ends.
        test: What `bdclean test` recorded; None without one.
        files: The files of the folder by name.
    """

    folder: RunFolder
    config: Mapping[str, Any]
    record: Record | None
    test: Record | None
    files: Mapping[str, Path]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a run folder.

        Args:
            path: A folder with `config.yaml`, `result.json` or `test.json`.

        Raises:
            DataError: If it holds none of these, or one that cannot be read.
        """
        folder = RunFolder(path)
        if not any(f.is_file() for f in (folder.config, folder.record, folder.test_record)):
            raise DataError(f"{path} is not the folder of a run: it holds no result.json.")
        return cls(
            folder,
            folder.read_config() if folder.config.is_file() else {},
            Record.read(folder.record) if folder.record.is_file() else None,
            Record.read(folder.test_record) if folder.test_record.is_file() else None,
            {file.name: file for file in sorted(path.glob("*")) if file.is_file()},
        )
