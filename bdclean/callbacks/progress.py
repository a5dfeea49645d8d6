"""Progress as plain lines, for logs and batch jobs."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLines(Callback):
    """One line per training epoch: loss, images per second, time passed and left."""

    def __init__(self) -> None:
        self._start = self._epoch_start = 0.0
        self._first_epoch = self._images = 0

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
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f"loss {float(loss):.4f}  "
        line = f"epoch {done}/{total}  {shown}{rate:,.0f} images/s  "
        line += f"{_clock(now - self._start)} passed, {_clock(left)} left"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
