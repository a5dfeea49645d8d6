"""Several stages inside one `trainer.fit`: one run, one log, one checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import Optimizer

from bdclean.errors import ConfigError
from bdclean.modules.base import BackdoorModule
from bdclean.modules.checkpoints import named_checkpoint
from bdclean.modules.reading import share_buffers, steps_per_epoch
from bdclean.modules.recipe import Recipe
from bdclean.modules.restored import Results
from bdclean.modules.trainer import (
    check_reloading,
    check_unused,
    ended_early,
    ignore_eval_mode,
    reduce_logged,
    set_max_epochs,
    setup_optimizers,
    uses_ddp,
)
from bdclean.types import Batch, View

StageOptimizer = Optimizer | OptimizerLRSchedulerConfig | list[Optimizer]


@dataclass(frozen=True)
class Stage:
    """One step of a method's outline: what it does, and for how long.

    Attributes:
        name: For logs and records; a plan may repeat it.
        recipe: How it trains; None for a stage that computes, or trains by hand.
        epochs: Its length, 0 for a stage that computes; a recipe brings its own.
        begin: Called when it begins, and not again on resume. What it draws comes from a
            generator of its own.
        reads: The view of a training stage.
        step: The loss of a batch; None takes the cross-entropy with the labels of the batch.
        optimizer: Makes the optimizer; None takes SGD on the whole model, by the recipe.
    """

    name: str
    recipe: Recipe | None = None
    _: KW_ONLY
    epochs: int = 0
    begin: Callable[[], None] | None = None
    reads: Callable[[], View] | None = None
    step: Callable[[Batch], Tensor | None] | None = None
    optimizer: Callable[[], StageOptimizer] | None = None

    @property
    def length(self) -> int:
        """Epochs."""
        return self.epochs if self.recipe is None else self.recipe.epochs

    @property
    def outline(self) -> tuple[str, int]:
        """What a checkpoint keeps of it."""
        return self.name, self.length


class StagedModule(BackdoorModule, ABC):
    """Runs the stages of `plan` one after the other; the number of epochs is the method's own.

    A subclass has `plan` and `make_networks`; it may replace `add_networks` and `check_data`.
    What trains is chosen by the optimizer of a stage: `requires_grad` is not changed between
    stages, because DDP would not notice. Schedules step per step (`Recipe.scheduled`). Under DDP,
    parameters that a stage does not use get gradients of zero, so plain `strategy: ddp` works.

    The stage changes at the end of an epoch, before checkpoints are written. What has begun or
    ended does not change on resume; a finished run is not extended. Checkpoints describe the
    networks: evaluating a run needs its checkpoint alone.

    Attributes:
        results: What stages compute (scores, rows, labels), by name; saved in checkpoints.
    """

    results: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.results = {}
        self._stage = 0  # len(plan) after the last one
        self._fitted = False  # a fit has begun, here or in the run that was restored
        self._resumed = False
        self._steps = 0  # in an epoch of the present training stage
        self._before: dict[str, Any] = {}  # what the run that is resumed has kept

    @abstractmethod
    def plan(self) -> tuple[Stage, ...]:
        """The outline of the method."""

    @abstractmethod
    def make_networks(self) -> None:
        """Installs the networks that a new fit starts from."""

    def add_networks(self) -> None:
        """Adds small networks to the others, and freezes what never trains.

        Called whenever the networks were built: for a new fit, and for a checkpoint.
        """

    def check_data(self) -> None:
        """Looks at the data before anything is trained."""

    # ------------------------------------------------------------------ where the run is

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The plan.

        Raises:
            ConfigError: If it is none.
        """
        plan: Any = self.plan()
        if not isinstance(plan, tuple | list) or not all(isinstance(s, Stage) for s in plan):
            raise ConfigError(
                f"{type(self).__name__}: plan() must return a tuple of stages, and it returned "
                f"{plan!r:.80}."
            )
        return tuple(plan)

    @property
    def total_epochs(self) -> int:
        """Sum over the plan."""
        return sum(stage.length for stage in self.stages)

    @property
    def stage_name(self) -> str | None:
        """The present stage, for displays; None when all are done."""
        return None if self.finished else self.stages[self._stage].name

    @property
    def round(self) -> int:
        """How often the present stage came before, for plans that repeat stages."""
        plan = self.stages
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
    def fitted(self) -> bool:
        """Whether a fit has begun: `model` is what it made, finished or not."""
        return self._fitted

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self._stage >= len(self.stages)

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Makes the networks and starts from the first stage; a checkpoint may change that."""
        if stage != "fit":
            return
        check_unused(self.trainer)
        self._check_stages()
        set_max_epochs(self.trainer, self.total_epochs)
        ignore_eval_mode()  # frozen networks are in it on purpose
        if sum(stage.length > 0 for stage in self.stages) > 1:
            check_reloading(self.trainer, self)
        self.make_networks()
        self.add_networks()
        self._stage, self._fitted, self._resumed, self.results = 0, True, False, {}
        self.check_data()

    def configure_optimizers(self) -> StageOptimizer:
        """The optimizer of the present training stage, or of the next one."""
        stage = self._training_stage()
        self._steps = steps_per_epoch(self.trainer, self._reads())
        if stage.optimizer is not None:
            return stage.optimizer()
        assert stage.recipe is not None, stage.name  # noqa: S101
        return self.sgd(stage.recipe, self.model.parameters())

    def on_fit_start(self) -> None:
        """Enters the first stage, or goes on with a restored one."""
        if self._resumed:
            self._check_outline()
            super().on_fit_start()
            self.request(self._reads())
        else:
            self._enter(0)

    def on_train_start(self) -> None:
        """Catches up with a checkpoint that another callback wrote just before a stage changed.

        Raises:
            ConfigError: If it was written in another epoch than its stage has.
        """
        if self._resumed:
            self._check_place()
        if not self.finished and self._is_over(self.current_epoch):
            self._advance()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One step of the present stage."""
        stage = self.stages[self._stage]
        loss = self.cross_entropy(batch) if stage.step is None else stage.step(batch)
        return None if loss is None else self.reaching_all(loss)

    def on_train_epoch_end(self) -> None:
        """Goes to the next stage after the last epoch of one, if that was a whole one."""
        if self._is_over(self.current_epoch + 1) and not ended_early(self.trainer):
            reduce_logged(self.trainer)
            self._advance()

    def on_train_end(self) -> None:
        """Leaves the same networks on all devices."""
        share_buffers(self)

    def kept(self) -> dict[str, Any]:
        """The stage and the results."""
        outline = [stage.outline for stage in self.stages]
        facts = {"plan": outline, "stage": self._stage, "steps": self._steps}
        return facts | {"results": dict(self.results)}

    def restore_kept(self, record: dict[str, Any]) -> None:
        """Restores the stage and the results."""
        self.add_networks()
        self._stage = record["stage"]
        self.results = Results(record["results"], named_checkpoint(self._trainer))
        if not 0 <= self._stage <= len(record["plan"]):
            raise ValueError(f"stage {self._stage} of {len(record['plan'])}")
        self._before = {"plan": record["plan"], "steps": record["steps"]}
        self._fitted = self._resumed = True

    # ------------------------------------------------------------------ for stages

    def sgd(
        self, recipe: Recipe, parameters: Iterable[Parameter], view: View | None = None
    ) -> StageOptimizer:
        """SGD with the recipe's schedule over what the present training stage reads."""
        return recipe.scheduled(recipe.sgd(parameters), self.trainer, view or self._reads())

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Mean cross-entropy with the labels of the batch, in float32.

        Raises:
            ConfigError: If there are none.
        """
        if "label" not in batch:
            raise ConfigError(
                f"{type(self).__name__}: the stage {self.stage_name} takes the cross-entropy with "
                "labels, and its batches show none; give the stage a `step`, or let it read a "
                "view with labels."
            )
        loss = F.cross_entropy(self.model(batch["image"]).float(), batch["label"])
        self.log_terms(**{f"{self.stage_name}_loss": loss})
        return loss

    def reaching_all(self, loss: Tensor) -> Tensor:
        """The loss, with gradients of zero for what it does not depend on.

        A stage may train a part of the networks, and DDP waits for the gradients of all.
        """
        if not uses_ddp(self.trainer):
            return loss
        trained = [p for p in self.parameters() if p.requires_grad]
        return loss + 0 * torch.stack([p.sum() for p in trained]).sum()

    # ------------------------------------------------------------------ stages

    def _first_epoch(self, index: int) -> int:
        return sum(stage.length for stage in self.stages[:index])

    def _is_over(self, epochs_done: int) -> bool:
        return epochs_done >= self._first_epoch(self._stage + 1)

    def _training_stage(self) -> Stage:
        """The present stage if it trains, else the next one; after the last one, that."""
        plan = self.stages
        ahead = [stage for stage in plan[self._stage :] if stage.length]
        return ahead[0] if ahead else [stage for stage in plan if stage.length][-1]

    def _reads(self) -> View:
        stage = self._training_stage()
        assert stage.reads is not None, stage.name  # noqa: S101
        return self.declared(stage.reads())

    def _advance(self) -> None:
        share_buffers(self)
        self._enter(self._stage + 1)
        if not self.finished:
            setup_optimizers(self.trainer)

    def _enter(self, index: int) -> None:
        """Begins stages up to and including the next one that trains."""
        self._stage = index
        while not self.finished:
            stage = self.stages[self._stage]
            self.model.train()
            if stage.begin is not None:
                stage.begin()
            if stage.length:
                self.request(self._reads())
                return
            self._stage += 1

    def _check_stages(self) -> None:
        plan, name = self.stages, type(self).__name__
        if not any(stage.length > 0 for stage in plan):
            raise ConfigError(f"{name}: its plan has no stage that trains; give one some epochs.")
        for stage in plan:
            if stage.length > 0 and stage.reads is None:
                raise ConfigError(f"{name}: the stage {stage.name} trains, so it needs `reads`.")
            if stage.length > 0 and stage.recipe is None and stage.optimizer is None:
                raise ConfigError(
                    f"{name}: the stage {stage.name} trains, so it needs a recipe or an optimizer."
                )

    def _check_place(self) -> None:
        begin, end = self._first_epoch(self._stage), self._first_epoch(self._stage + 1)
        if not begin <= self.current_epoch <= end:
            raise ConfigError(
                f"{named_checkpoint(self.trainer)}: its stage {self._stage + 1} has the epochs "
                f"{begin} to {end}, and its loops have ended {self.current_epoch}; it is damaged, "
                "so start a new run."
            )

    def _check_outline(self) -> None:
        """A run goes on if all is as it was as far as the present stage, or to the end."""
        now = [stage.outline for stage in self.stages]
        before = [tuple(outline) for outline in self._before["plan"]]
        for number, stages in enumerate(zip_longest(before, now), 1):
            if number <= self._stage + 1 and stages[0] != stages[1]:
                was, is_now = (f"{s[0]}, {s[1]} epochs" if s else "none" for s in stages)
                raise ConfigError(
                    f"{named_checkpoint(self.trainer)}: Stage {number} of the checkpoint's run: "
                    f"{was}; of this run: {is_now}. Resume with the settings it had, or start a "
                    "new run."
                )
        if not self.finished and self._before["steps"] != self._steps:
            raise ConfigError(
                f"{named_checkpoint(self.trainer)}: an epoch of the checkpoint's run has "
                f"{self._before['steps']} steps, and one of this run {self._steps}. Resume with "
                "the devices, batch size and limits it had, or start a new run."
            )
