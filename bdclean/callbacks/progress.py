"""Progress as plain lines, for logs and batch jobs."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLines(Callback):
    """One line per training epoch: loss, or the losses of a method's present stage, and speed."""

    def __init__(self) -> None:
        self._start = self._epoch_start = 0.0
        self._first_epoch = self._images = 0
        self._seen: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start = self._epoch_start = time.perf_counter()
        self._images = 0
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's clock."""
        self._epoch_start = time.perf_counter()
        self._images = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts images."""
        self._images += len(batch["index"]) if isinstance(batch, dict) else 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the line."""
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        rate = self._images * trainer.world_size / max(1e-9, now - self._epoch_start)
        done = trainer.current_epoch + 1
        total = trainer.max_epochs or done
        left = (now - self._start) / (done - self._first_epoch) * max(0, total - done)
        shown = "".join(f"{name} {value:.4f}  " for name, value in self._news(trainer).items())
        line = f"epoch {done}/{total}  {shown}{rate:,.0f} images/s  "
        line += f"{_clock(now - self._start)} passed, {_clock(left)} left"
        print(line, file=sys.stderr, flush=True)

    def _news(self, trainer: Trainer) -> dict[str, float]:
        """Losses of this epoch; a stage of a method may log other ones than the stage before."""
        losses = {
            name.removeprefix("train/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/")
        }
        news = {name: value for name, value in losses.items() if self._seen.get(name) != value}
        self._seen = losses
        return {"loss": news["loss"]} if "loss" in news else news


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
