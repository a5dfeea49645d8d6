"""The folder of a run: what lies where in it, and which experiment it is.

A run folder can be moved: nothing in it says where it lies, and what belongs together is found
from the folder's path alone.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdclean.errors import ConfigError, DataError
from bdclean.files import (
    FORMAT_KEY,
    SAFETENSORS,
    safetensors_metadata,
    sha256_of_file,
    write_text,
)
from bdclean.yaml_text import parse, read

if TYPE_CHECKING:  # reading a record takes neither torch nor Lightning
    from bdclean.data import ImageDataModule

LAST = "last"
"""As `--ckpt_path`: the newest checkpoint of the run."""
_OF_REQUEUE = re.compile(r"hpc_ckpt_\d+\.ckpt")
SCHEMA = 1
"""Version of `result.json`. Records without a `schema` are of version 0."""


@dataclass(frozen=True)
class RunFolder:
    """The folder that one run writes into.

    Attributes:
        path: Where it lies now; it need not exist.
    """

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> "RunFolder | None":
        """The run that wrote a checkpoint; None without such a file, or a config beside it.

        Args:
            checkpoint: `RUN/checkpoints/NAME.ckpt`, or `RUN/hpc_ckpt_N.ckpt` of a requeued job;
                the word `last` is no file.
        """
        if checkpoint == LAST or not os.path.isfile(checkpoint):  # noqa: PTH113  (of any length)
            return None
        file = Path(checkpoint).resolve()
        runs = (cls(file.parent.parent), cls(file.parent))
        return next((run for run in runs if run.config.is_file()), None)

    # ------------------------------------------------------------------ what lies where

    @property
    def config(self) -> Path:
        """The merged config of the fit."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """What was done, what came out, and what it cost."""
        return self.path / "result.json"

    @property
    def test_record(self) -> Path:
        """The record of a test without a fit."""
        return self.path / "test.json"

    @property
    def weights(self) -> Path:
        """The product."""
        return self.path / "model.safetensors"

    @property
    def plan(self) -> Path:
        """The poison plan: settings and counts; its indices lie in `plan.safetensors`."""
        return self.path / "plan.json"

    @property
    def trigger(self) -> Path:
        """The trigger of the attack."""
        return self.path / "trigger.safetensors"

    @property
    def suspects(self) -> Path:
        """What a defence says of each training sample."""
        return self.path / "suspects.csv"

    def predictions(self, name: str) -> Path:
        """What the model says of the images of one evaluation set.

        Args:
            name: Of the set.
        """
        return self.path / f"predictions-{name}.safetensors"

    @property
    def metrics(self) -> Path:
        """What the latest start of the run logged."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last whole epoch."""
        return self.checkpoints / "last.ckpt"

    def newest_checkpoint(self) -> Path | None:
        """The newest of all checkpoints, those of requeued jobs (`hpc_ckpt_N.ckpt`) among them."""
        found = [*self.path.glob("*.ckpt"), *self.checkpoints.glob("*.ckpt")]
        kept = [file for file in found if file.is_file()]
        return max(kept, key=lambda path: path.stat().st_mtime, default=None)

    def of_requeues(self) -> list[Path]:
        """The checkpoints from which Lightning resumes a requeued job of a cluster."""
        found = self.path.glob("hpc_ckpt_*.ckpt")
        return [file for file in found if _OF_REQUEUE.fullmatch(file.name) and file.is_file()]

    def configs(self) -> list[Path]:
        """The config, and those under which the run was resumed; in order."""
        return [file for file in (self.config, *_numbered(self.config)) if file.is_file()]

    def logs(self) -> list[Path]:
        """The metrics of all starts of the run, the latest start last."""
        return [file for file in (*_numbered(self.metrics), self.metrics) if file.is_file()]

    # ------------------------------------------------------------------ what is known of it

    @property
    def is_run(self) -> bool:
        """Whether a fit of ours wrote its config here."""
        try:
            lines = self.config.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return False
        ours = any("class_path: bdclean." in line for line in lines)
        return ours and any(line.startswith("run:") for line in lines)

    @property
    def is_finished(self) -> bool:
        """Whether the fit came to its end."""
        return self.record.is_file()

    def read_config(self) -> dict[str, Any]:
        """The config.

        Raises:
            ConfigError: If there is none.
        """
        if not self.config.is_file():
            raise ConfigError(
                f"{self.path}: there is no config.yaml; give folders that bdclean fit wrote."
            )
        return _read_yaml(self.config)

    def read_record(self) -> dict[str, Any]:
        """The record; see `read_record`."""
        return read_record(self.record)

    def make_data(self) -> "ImageDataModule":
        """The data module of the run, as the run made it.

        Raises:
            ConfigError: If there is no config, or it holds no data module.
        """
        from jsonargparse import ArgumentParser

        from bdclean.data import ImageDataModule

        config = self.read_config()
        if "data" not in config:
            raise ConfigError(f"{self.config}: there is no data module in it.")
        parser = ArgumentParser()
        parser.add_argument("--data", type=ImageDataModule, required=True)
        made = parser.instantiate(parser.parse_object({"data": config["data"]}))
        data: ImageDataModule = made.data
        return data

    def cell(self, plan_hash: str | None) -> str | None:
        """The hash of the experiment, see `cell_hash`.

        None where there is no config, where the run was resumed as another experiment, or where a
        weights file that the config names is gone.

        Args:
            plan_hash: Of the poison plan; None without one.
        """
        try:
            cells = {cell_hash(_read_yaml(file), plan_hash) for file in self.configs()}
        except OSError:
            return None
        return cells.pop() if len(cells) == 1 else None

    # ------------------------------------------------------------------ what is written

    def belongs_to_another(self, config: str) -> bool:
        """Whether a run with another config than this text has begun here."""
        return self.config.is_file() and self.config.read_bytes() != config.encode()

    def save_config(self, config: str) -> None:
        """Writes the text of a config; where another one lies, beside it under a number."""
        if self.belongs_to_another(config):
            write_text(_next_number(self.config), config)
        elif not self.config.is_file():
            write_text(self.config, config)

    def keep_old_metrics(self) -> None:
        """Moves the metrics of an earlier start aside, which the logger would delete."""
        if self.metrics.is_file():
            self.metrics.rename(_next_number(self.metrics))


def read_record(path: Path) -> dict[str, Any]:
    """A record of a run, `schema` 0 where it says none.

    Raises:
        DataError: If it is missing, no record, or of a later version than this package knows.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; let the run end first.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable record ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} is not a record of a run.")
    record = {"schema": 0} | record
    if not isinstance(record["schema"], int) or record["schema"] > SCHEMA:
        raise DataError(
            f"{path}: schema={record['schema']}: this version of bdclean reads records up to "
            f"schema {SCHEMA}; update bdclean."
        )
    return record


# ---------------------------------------------------------------------- which experiment

HARDWARE = frozenset({"accelerator", "devices", "num_nodes", "strategy", "plugins"})
"""Keys of the trainer that say on what a run runs."""
_LOGGING = frozenset({"logger", "log_every_n_steps", "profiler", "model_registry"})
_PLACEMENT: Mapping[str, frozenset[str]] = {
    "": frozenset({"run", "checkpoint", "ckpt_path", "weights_only"}),
    "trainer": HARDWARE | _LOGGING | {"default_root_dir"},
    "trainer.callbacks.init_args": frozenset({"dirpath", "folder"}),
    "data.init_args": frozenset({"download", "cache"}),
}
"""Keys, by the section that they are in, that say where and on what a run runs."""
_SWITCHES = "enable_"  # of the trainer: bars, summaries, checkpoints
_NETWORK = frozenset({"arch", "width", "stem"})
"""Keys of a model that a weights file of ours answers as well; a contradiction is refused."""
_WEIGHTS = (SAFETENSORS, ".pt", ".pth", ".ckpt", ".bin", ".tar")


def cell_hash(config: Mapping[str, Any], plan_hash: str | None) -> str:
    """What tells an experiment from all others, as SHA-256 in hexadecimal.

    Two runs have the same hash if they have the same settings, poisoned rows and weights files,
    whatever their folders, loggers and devices are.

    Args:
        config: The merged config of the fit.
        plan_hash: Of the poison plan; None without one.

    Raises:
        OSError: If a weights file that the config names cannot be read.
    """
    whole = {"config": canonical(config), "plan": plan_hash}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def canonical(config: Mapping[str, Any], *, content: bool = True) -> dict[str, Any]:
    """The settings of a config that belong to the experiment.

    Left out is what says where and on what it runs, and what a weights file of ours says itself.
    In place of the path of a weights file stands the hash of its content. The precision stays,
    because it changes numbers, and so does the folder of the images, because two folders may differ
    in nothing else.

    Args:
        config: The merged config of the fit.
        content: False leaves weights files unread, so that they are all alike.

    Raises:
        OSError: If a weights file cannot be read.
    """
    whole: dict[str, Any] = _canonical(config, "", content)
    return whole


def weights_files(config: Mapping[str, Any]) -> dict[str, str]:
    """The weights files that model and data of a config name, by the keys that users type."""
    named = {key: config.get(key) for key in ("model", "data")}
    return {k: v for k, v in leaves(named) if isinstance(v, str) and v.endswith(_WEIGHTS)}


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config with the keys that users type, below `key`."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    else:
        yield key, tree


def _canonical(value: Any, section: str, content: bool) -> Any:
    if isinstance(value, Mapping):
        told = _NETWORK if content and _is_ours(value.get("weights")) else frozenset()
        return {
            key: _canonical(item, f"{section}.{key}".lstrip("."), content)
            for key, item in value.items()
            if key not in told and not _is_placement(section, str(key))
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_canonical(item, section, content) for item in value]
    if isinstance(value, str) and value.endswith(_WEIGHTS):
        if not content:
            return "a weights file"
        return f"sha256 {sha256_of_file(Path(value).expanduser())}"
    return value


def _is_ours(weights: object) -> bool:
    """Whether this is the path of a weights file of ours, which names its network.

    Raises:
        OSError: If there is no such file.
    """
    if not (isinstance(weights, str) and weights.endswith(SAFETENSORS)):
        return False
    return FORMAT_KEY in safetensors_metadata(Path(weights).expanduser())


def _is_placement(section: str, key: str) -> bool:
    if section == "trainer" and key.startswith(_SWITCHES):
        return True
    return key in _PLACEMENT.get(section, frozenset())


# ---------------------------------------------------------------------- helpers


def _read_yaml(file: Path) -> dict[str, Any]:
    source = f"{file} is not a readable config"
    config = deepcopy(parse(read(file, source), source))
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not the config of a run.")
    return config


def _numbered(path: Path) -> list[Path]:
    """The files NAME.1.SUFFIX, NAME.2.SUFFIX ... beside `path`, in the order of their numbers."""
    found = path.parent.glob(f"{path.stem}.*{path.suffix}")
    numbers = [file.stem[len(path.stem) + 1 :] for file in found]
    ordered = sorted((number for number in numbers if number.isdecimal()), key=int)
    return [path.with_stem(f"{path.stem}.{number}") for number in ordered]


def _next_number(path: Path) -> Path:
    number = 1
    while (beside := path.with_stem(f"{path.stem}.{number}")).exists():
        number += 1
    return beside
