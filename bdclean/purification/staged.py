"""Several stages inside one `trainer.fit`: one run, one log, one checkpoint."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bdclean.backbones.source import FreshSource, WeightsSource
from bdclean.errors import ConfigError
from bdclean.metrics.fitting import cut_short, share_buffers
from bdclean.purification.base import Purifier
from bdclean.types import Batch, View

EARLIER_VERSION = (
    "The checkpoint is of an earlier version of bdclean, which kept other things of a run; start a "
    "new run."
)
_RECORD = "bdclean_stages"  # our entry in a checkpoint
StageOptimizer = Optimizer | OptimizerLRSchedulerConfig


@dataclass(frozen=True)
class Stage:
    """One step of a method's outline.

    Attributes:
        name: Of the methods that belong to it.
        epochs: Its length; 0 is a stage that computes and does not train.
    """

    name: str
    epochs: int


class StagedPurifier(Purifier, ABC):
    """Runs the stages of `plan` one after the other.

    For each stage `<name>` a subclass has `begin_<name>()` (optional for training stages), and,
    for a training stage, `<name>_view() -> View`, `<name>_step(batch) -> Tensor` and
    `<name>_optimizer() -> StageOptimizer`; where one is missing, `usual_step(stage, batch)` and
    `usual_optimizer(stage)` of the subclass count. What trains is chosen by the optimizer:
    `requires_grad` is not changed between stages, because DDP would not notice. Schedules step
    per step (see `bdclean.metrics.fitting.scheduled`). Under DDP, parameters that a stage does not
    use get gradients of zero, so plain `strategy: ddp` works.

    The stage changes at the end of an epoch, before checkpoints are written; `begin_` is not
    called again on resume. A stage that draws random numbers in `begin_` uses a generator of
    its own. What has begun or ended does not change on resume; a finished run is not extended.

    Attributes:
        results: What stages compute (scores, rows, labels), by name; saved in checkpoints.
    """

    results: dict[str, Tensor]

    def __init__(self, source: WeightsSource | FreshSource) -> None:
        super().__init__(source)
        self.results = {}
        self._stage = 0  # len(plan) after the last one
        self._resumed = False
        self._plan_before: list[Stage] = []  # of the run that is resumed

    @abstractmethod
    def plan(self) -> tuple[Stage, ...]:
        """The outline of the method."""

    @property
    def total_epochs(self) -> int:
        """Sum over the plan."""
        return sum(stage.epochs for stage in self.plan())

    @property
    def round(self) -> int:
        """How often the present stage came before, for plans that repeat stages."""
        plan = self.plan()
        return sum(stage.name == plan[self._stage].name for stage in plan[: self._stage])

    @property
    def stage_epoch(self) -> int:
        """Epochs that the present stage has finished."""
        return self.current_epoch - self._first_epoch(self._stage)

    @property
    def last_epoch(self) -> int:
        """The number, from 0, of the last epoch before the present stage; -1 before the first."""
        return self._first_epoch(self._stage) - 1

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self._stage >= len(self.plan())

    @property
    def purified(self) -> bool:
        """Whether the method ran to its end."""
        return self.finished

    def first_view(self) -> View:
        """The view of the present (or last) training stage."""
        view: View = self._of("view", self._training_stage())()
        return view

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Checks the Trainer and starts from the first stage; a checkpoint may change that."""
        super().setup(stage)
        if stage == "fit":
            self._stage, self._resumed, self.results = 0, False, {}
            self._check_trainer()

    def configure_optimizers(self) -> StageOptimizer:
        """The optimizer of the present training stage, or of the next one."""
        stage = self._training_stage()
        self.request(self.first_view())  # its length is what a schedule needs
        optimizer: StageOptimizer = self._of("optimizer", stage)()
        return optimizer

    def on_fit_start(self) -> None:
        """Enters the first stage, or goes on with a restored one."""
        if self._resumed:
            self._check_plan()
            super().on_fit_start()
        else:
            self._enter(0)

    def on_train_start(self) -> None:
        """Catches up with a checkpoint that was written at the last batch of a stage."""
        if not self.finished and self._is_over(self.current_epoch):
            self._advance()
            # The loop compares the batches done, of the old loader, with the length of the new
            # one, to see whether the epoch is over. It is.
            self.trainer.fit_loop.epoch_loop.batch_progress.current.completed = sys.maxsize

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the present stage."""
        loss: Tensor = self._of("step", self.plan()[self._stage])(batch)
        if isinstance(self.trainer.strategy, DDPStrategy):
            # A stage may train a part of the network, and DDP waits for the gradients of all.
            loss = loss + 0 * torch.stack([p.sum() for p in self._trainable()]).sum()
        return loss

    def on_train_epoch_end(self) -> None:
        """Goes to the next stage after the last epoch of one, if that was a whole one."""
        if self._is_over(self.current_epoch + 1) and not cut_short(self.trainer):
            # A progress display has reduced the metrics over all ranks, but on rank 0 alone. The
            # others do it here, before what they exchange next.
            _ = self.trainer.callback_metrics
            self._advance()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the stage and the results."""
        super().on_save_checkpoint(checkpoint)
        plan = [(stage.name, stage.epochs) for stage in self.plan()]
        results = dict(self.results)
        checkpoint[_RECORD] = {"stage": self._stage, "results": results, "plan": plan}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the stage and the results."""
        super().on_load_checkpoint(checkpoint)
        record = checkpoint[_RECORD]
        self._stage, self.results = record["stage"], record["results"]
        self._plan_before = [Stage(*stage) for stage in record.get("plan", ())]
        self._resumed = True

    # ------------------------------------------------------------------ stages

    def _first_epoch(self, index: int) -> int:
        return sum(stage.epochs for stage in self.plan()[:index])

    def _is_over(self, epochs_done: int) -> bool:
        return epochs_done >= self._first_epoch(self._stage + 1)

    def _training_stage(self) -> Stage:
        plan = self.plan()
        ahead = [stage for stage in plan[self._stage :] if stage.epochs]
        return ahead[0] if ahead else [stage for stage in plan if stage.epochs][-1]

    def _advance(self) -> None:
        share_buffers(self)
        self._enter(self._stage + 1)
        if not self.finished:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def _enter(self, index: int) -> None:
        """Begins stages up to and including the next one that trains."""
        self._stage = index
        while not self.finished:
            stage = self.plan()[self._stage]
            self.model.train()
            begin = getattr(self, f"begin_{stage.name}", None)
            if begin is not None:
                begin()
            if stage.epochs:
                self.request(self._of("view", stage)())
                return
            self._stage += 1

    def _trainable(self) -> list[Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _of(self, part: str, stage: Stage) -> Callable[..., Any]:
        own = getattr(self, f"{stage.name}_{part}", None)
        return own or partial(getattr(self, f"usual_{part}"), stage)

    def _check_plan(self) -> None:
        """A run goes on if all is as it was as far as the present stage, or to the end."""
        if not self._plan_before:
            raise ConfigError(EARLIER_VERSION)
        pairs = enumerate(zip_longest(self._plan_before, self.plan()), 1)
        for number, (before, now) in list(pairs)[: self._stage + 1]:
            if before != now:
                told = [f"{s.name}, {s.epochs} epochs" if s else "none" for s in (before, now)]
                raise ConfigError(
                    f"Stage {number} of the checkpoint's run: {told[0]}; of this run: {told[1]}. "
                    "Resume with the settings it had, or start a new run."
                )

    def _check_trainer(self) -> None:
        training = [stage for stage in self.plan() if stage.epochs]
        every = getattr(self.trainer, "reload_dataloaders_every_n_epochs")  # noqa: B009  (untyped)
        if len(training) > 1 and every != 1:
            raise ConfigError(
                f"trainer.reload_dataloaders_every_n_epochs={every}: "
                f"{type(self).__name__} reads other images in later stages; set it to 1."
            )
