"""The record of a run: what was done, what came out, and what it cost."""

import json
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bdclean.backbones import save_model
from bdclean.callbacks.writing import run_to_write
from bdclean.files import sha256_of_file, write_text
from bdclean.functional.seeds import global_seed
from bdclean.metrics import DEFINITIONS
from bdclean.metrics.identification import identification
from bdclean.modules import BackdoorModule
from bdclean.modules.reading import data_of
from bdclean.runs import SCHEMA, RunFolder
from bdclean.types import DescribesItself, KnowsTruth

_LIBRARIES = ("bdclean", "torch", "torchvision", "lightning", "torchmetrics", "timm")


class RunRecord(Callback):
    """Writes `model.safetensors`, plan, trigger and `result.json` into the run folder.

    A fit writes the weights and `result.json`, with `identification` where the method judges the
    samples of its training set; a test that follows in the same process adds its metrics to it.
    A test alone writes `test.json`. Only the first process writes. A fit that goes on with a run
    that has ended trains nothing, and leaves its files as they are.

    Args:
        folder: The run folder; None takes the logger's.

    Attributes:
        record: As it was written, or found.
        stays: Whether the fit was one of a run that has ended, so that its record stays.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {}
        self._seconds = {"train": 0.0, "evaluation": 0.0}
        self._started = 0.0
        self._fitted = self._trained = False
        self.stays = False

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far, so that a resumed run reports the sum."""
        return {"train_seconds": self._seconds["train"] + time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues counting where the checkpoint was written."""
        self._seconds["train"] = state_dict["train_seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is something to train."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes weights, plan and trigger, and the record without metrics."""
        self._seconds["train"] += time.perf_counter() - self._started
        self._fitted = True
        run = run_to_write(trainer, self.folder)
        if run is None:
            return
        if self._has_ended(trainer, run):
            self.record, self.stays = run.read_record(), True
            return
        self.record = self._facts(trainer, pl_module, run)
        self.record["hashes"]["cell"] = run.cell(self.record["data"].get("plan_hash"))
        data = data_of(trainer)
        if isinstance(data, DescribesItself):
            data.save_artifacts(run.path)
        if isinstance(pl_module, BackdoorModule):
            self._add_product(pl_module, data, run)
        self._write(run.record)

    def _has_ended(self, trainer: Trainer, run: RunFolder) -> bool:
        """Whether this fit went on with a run that was at its end, and has all of its files."""
        if self._trained or trainer.ckpt_path is None or not run.is_finished:
            return False
        cost = run.read_record().get("cost")
        steps = cost.get("steps") if isinstance(cost, dict) else None
        return steps == trainer.global_step and run.weights.is_file()

    def _add_product(self, module: BackdoorModule, data: Any, run: RunFolder) -> None:
        """Writes what the module made, and adds it to the record."""
        done = {"made_by": json.dumps(self.record["protocol"])}
        self.record["hashes"]["weights"] = save_model(module.product(), run.weights, done)
        module.save_artifacts(run.path)
        findings = module.findings()
        if findings is not None:
            truth = data.training_set() if isinstance(data, KnowsTruth) else None
            self.record["identification"] = identification(findings, truth)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the metrics with their counts, and writes the record."""
        self._seconds["evaluation"] += time.perf_counter() - self._started
        run = run_to_write(trainer, self.folder)
        if run is None:
            return
        if not self._fitted:
            self.record = self._facts(trainer, pl_module, run)
        metrics = {
            key.removeprefix("test/"): round(float(value), 4)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("test/")
        }
        if isinstance(pl_module, BackdoorModule):
            metrics |= pl_module.evaluation_counts("test")
            intervals = pl_module.evaluation_intervals("test")
            self.record["intervals"] = {
                key: [round(end, 2) for end in ends] for key, ends in intervals.items()
            }
        self.record["metrics"] = metrics
        self.record["cost"]["evaluation_seconds"] = round(self._seconds["evaluation"], 2)
        self._write(run.record if self._fitted else run.test_record)

    def _facts(self, trainer: Trainer, module: LightningModule, run: RunFolder) -> dict[str, Any]:
        data = data_of(trainer)
        return {
            "schema": SCHEMA,
            "metrics": {},
            "intervals": {},
            "definitions": DEFINITIONS,
            "protocol": module.protocol() if isinstance(module, BackdoorModule) else {},
            "data": data.describe() if isinstance(data, DescribesItself) else {},
            "cost": {
                "train_seconds": round(self._seconds["train"], 2),
                "steps": trainer.global_step,
                "epochs": trainer.current_epoch,
                "peak_memory_mib": _peak_memory(),
                "device": _device_name(trainer),
                "num_devices": trainer.world_size,
                "precision": str(trainer.precision),
            },
            "hashes": {"config": sha256_of_file(run.config) if run.config.is_file() else None},
            "seed": global_seed(),
            "versions": {name: version(name) for name in _LIBRARIES}
            | {"python": platform.python_version()},
        }

    def _write(self, path: Path) -> None:
        write_text(path, json.dumps(self.record, indent=2) + "\n")


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
