"""How far a fit is: a bar on a terminal, plain lines in logs and batch jobs."""

import math
import sys
import time
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from bdclean.modules.staged import StagedModule
from bdclean.progress import Pace, duration, rate


class FitClock:
    """Where a fit is, and how long it still takes.

    Stages differ in what an epoch costs. What is left of a stage is estimated from its own epochs
    once it has trained, here or in an earlier round; before that, from the mean of all epochs so
    far, and the estimate then says `about`.

    Attributes:
        stage: The name of the present stage; "" where the module has none.
    """

    def __init__(self) -> None:
        self.stage = ""
        self.start()

    def start(self) -> None:
        """Begins a fit."""
        self._begin = self._since = self._last = time.perf_counter()
        self._first: float | None = None  # where the stage began; epochs, as the next one
        self._done = 0.0
        self._idle = 0.0
        self._images = 0
        self._plan: list[tuple[str, int]] = []  # names and epochs; empty where there is none
        self._spent: dict[str, tuple[float, float]] = {}  # epochs and seconds, by stage
        self._before = (0.0, 0.0)  # the same, of earlier rounds of the present stage

    def before_batch(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> bool:
        """Returns whether a stage begins with this batch, after another one."""
        stage, follows = getattr(module, "stage_name", None) or "", self._first is not None
        if follows and stage == self.stage:
            return False
        self.stage = stage
        self._since = time.perf_counter()
        # What a method does between two stages belongs to the second one.
        self._idle = self._since - self._last if follows else 0.0
        self._first = self._done = _epochs(trainer, batch_idx)
        self._images = 0
        self._before = self._spent.get(stage, (0.0, 0.0))
        if isinstance(module, StagedModule):
            self._plan = [stage.outline for stage in module.plan()]
        return follows

    def after_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Counts the images of a batch, and what the stage has cost."""
        self._done = _epochs(trainer, batch_idx + 1)
        self._last = time.perf_counter()
        if isinstance(batch, dict):
            self._images += len(batch["index"]) * trainer.world_size
        if self._first is not None and self._done > self._first:
            epochs, seconds = self._before
            self._spent[self.stage] = (
                epochs + self._done - self._first,
                seconds + self._idle + self._last - self._since,
            )

    def speed(self) -> str:
        """Images per second in the present stage."""
        return rate(self._images, time.perf_counter() - self._since, "images")

    def passed(self) -> str:
        """Time since the fit began."""
        return f"{duration(time.perf_counter() - self._begin)} passed"

    def left(self, trainer: Trainer) -> str | None:
        """Time until the end of the fit; None where its length is not known, or no batch done."""
        total = trainer.max_epochs
        if total is None or total < 0 or self.stage not in self._spent:
            return None
        ahead = self._ahead(total)
        costs = {name: seconds / epochs for name, (epochs, seconds) in self._spent.items()}
        epochs, seconds = map(sum, zip(*self._spent.values(), strict=True))
        still = sum(left * costs.get(name, seconds / epochs) for name, left in ahead)
        about = "" if all(name in costs for name, _ in ahead) else "about "
        return f"{about}{duration(still)} left"

    def _ahead(self, total: int) -> list[tuple[str, float]]:
        """The stages that are not over, and the epochs that are left of each."""
        ahead, first = [], 0
        for name, length in self._plan or [(self.stage, total)]:
            left = min(first + length, total) - max(first, self._done)
            if left > 0:
                ahead.append((name, left))
            first += length
        return ahead


class ProgressLines(Callback):
    """A line every half minute: where the fit is, its losses, its speed, and the time left.

    The first line comes after ten seconds, within an epoch as well, and every stage of a method
    has one line at least. Losses are those that the present stage has logged since the last line.
    """

    def __init__(self) -> None:
        self._clock, self._pace = FitClock(), Pace()
        self._told: set[str] = set()  # stages
        self._seen: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._clock.start()
        self._pace = Pace()
        self._told = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks whether a stage begins; what the one before it has logged is not news then."""
        if self._clock.before_batch(trainer, pl_module, batch_idx):
            self._seen = _losses(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prints a line within an epoch if one is due."""
        self._clock.after_batch(trainer, batch, batch_idx)
        total = trainer.num_training_batches
        if trainer.is_global_zero and batch_idx + 1 < total and self._pace.due():
            self._print(trainer, f", batch {batch_idx + 1:,}/{total:,}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line if one is due, at the first end of a stage's epoch, and at the last."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        new = self._clock.stage not in self._told
        if trainer.is_global_zero and (self._pace.due() or new or last):
            self._print(trainer, "")

    def _print(self, trainer: Trainer, within: str) -> None:
        clock = self._clock
        self._told.add(clock.stage)
        total = trainer.max_epochs
        of = f"/{total}" if total is not None and total > 0 else ""
        place = f"epoch {trainer.current_epoch + 1}{of}{within}"
        losses = [f"{name} {value:.4f}" for name, value in self._news(trainer).items()]
        left = clock.left(trainer)
        times = f"{clock.passed()}, {left}" if left else clock.passed()
        head = f"{clock.stage}: {place}" if clock.stage else place
        with suppress(OSError):  # a full disk under a log ends no training
            print("  ".join([head, *losses, clock.speed(), times]), file=sys.stderr, flush=True)

    def _news(self, trainer: Trainer) -> dict[str, float]:
        """Losses since the last line; a stage may log other ones than the stage before."""
        losses = _losses(trainer)
        news = {name: value for name, value in losses.items() if self._seen.get(name) != value}
        self._seen = losses
        return {"loss": news["loss"]} if "loss" in news else news


class StageBar(RichProgressBar):
    """Lightning's bar, which also names the stage of the method and the time left for the fit."""

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})
        self._clock = FitClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._clock.start()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks whether a stage begins."""
        self._clock.before_batch(trainer, pl_module, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the images."""
        self._clock.after_batch(trainer, batch, batch_idx)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar: the stage, the losses, and the time left for the fit."""
        stage, left = self._clock.stage, self._clock.left(trainer)
        shown = super().get_metrics(trainer, pl_module)
        named = {"stage": stage} if stage else {}
        return named | shown | ({"fit": left} if left else {})


def _losses(trainer: Trainer) -> dict[str, float]:
    """What was logged last of the training, by name."""
    return {
        name.removeprefix("train/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("train/")
    }


def _epochs(trainer: Trainer, batches: int) -> float:
    """Epochs done, parts of them included."""
    total = trainer.num_training_batches
    return trainer.current_epoch + (batches / total if math.isfinite(total) and total else 0.0)
