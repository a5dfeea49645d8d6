"""A run and its record as values. Files are read here and never written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from bdclean.errors import DataError

SCHEMA = 1  # the newest form of `result.json` that is understood here
_PARTS = ("metrics", "protocol", "cost")


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
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: the record cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise DataError(f"{path}: a record is a JSON file, and this is not one.") from error
        parts = content if isinstance(content, dict) else {}
        absent = [part for part in _PARTS if not isinstance(parts.get(part), dict)]
        if absent:
            raise DataError(f"{path}: it is not the record of a run; it lacks {', '.join(absent)}.")
        record = cls(path, content)
        if record.schema > SCHEMA:
            raise DataError(
                f"{path}: schema {record.schema} is newer than {SCHEMA}; update bdclean."
            )
        return record

    @property
    def schema(self) -> int:
        """The form of the file; 0 for records from before there was a number."""
        return int(self.content.get("schema", 0))

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
        folder: Where it is.
        config: The merged configuration; empty where the folder has none.
        record: What the fit recorded; None before it ends.
        test: What `bdclean test` recorded; None without one.
        files: The files of the folder by name.
    """

    folder: Path
    config: Mapping[str, Any]
    record: Record | None
    test: Record | None
    files: Mapping[str, Path]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a run folder.

        Args:
            folder: With `config.yaml`, `result.json` or `test.json`.

        Raises:
            DataError: If it holds none of these, or one that cannot be read.
        """
        files = {path.name: path for path in sorted(folder.glob("*")) if path.is_file()}
        if not files.keys() & {"config.yaml", "result.json", "test.json"}:
            raise DataError(f"{folder}: it is not the folder of a run; it holds no result.json.")
        return cls(
            folder,
            read_yaml(files["config.yaml"]) if "config.yaml" in files else {},
            Record.read(files["result.json"]) if "result.json" in files else None,
            Record.read(files["test.json"]) if "test.json" in files else None,
            files,
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Args:
        path: The file.

    Raises:
        DataError: If it is missing, is not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: the file holds no mapping of keys to values.")
    return content
