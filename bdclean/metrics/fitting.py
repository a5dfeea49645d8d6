"""What every module that trains on views of the data asks of Lightning's Trainer."""

import math
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from bdclean.errors import ConfigError
from bdclean.functional.schedules import Schedule, make_schedule
from bdclean.types import Batch, View, ViewableData

# As if no limit was given: Lightning makes 1000 of None before `setup` is called, so that a given
# 1000 looks the same; -1 means "without end".
_UNLIMITED = (None, -1, 1000)
_STEPS = "bdclean_steps"  # our entry in a checkpoint


def own_epochs(trainer: Trainer, epochs: int) -> None:
    """Makes the fit last `epochs` epochs, the method's own number.

    Called in `setup("fit")`, after Trainer has parsed its limits. A development run
    (`fast_dev_run`) keeps its limit.

    Raises:
        ConfigError: If trainer.max_epochs was given and differs; a given 1000 passes for none.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    given = trainer.fit_loop.max_epochs
    if given not in _UNLIMITED and given != epochs:
        raise ConfigError(
            f"trainer.max_epochs={given}, but the method's own settings add up to {epochs} epochs. "
            f"Leave trainer.max_epochs at -1 (or set it to {epochs}), and change model.init_args."
        )
    trainer.fit_loop.max_epochs = epochs


def cut_short(trainer: Trainer) -> bool:
    """Whether the epoch that ends here lacks batches: max_steps, max_time ... have ended it."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return 0 < done < trainer.num_training_batches


def whole_epochs(trainer: Trainer) -> int:
    """Epochs done in full; asked at the end of an epoch or of the fit."""
    epochs = vars(trainer.fit_loop.epoch_progress.current)
    return int(epochs["processed"]) - cut_short(trainer)


def reopen_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Has a resumed run go on within an epoch that was cut short; Lightning calls it done."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    if cut_short(trainer) and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for progress in epochs.values():
            progress["processed"] = progress["completed"] = progress["ready"] - 1


def viewable_data(trainer: Trainer) -> ViewableData:
    """The data module.

    Raises:
        ConfigError: If there is none, or it cannot serve views.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ViewableData):
        raise ConfigError(
            f"data={type(data).__name__}: the method chooses what it reads, so it needs a data "
            "module with set_view and reading_dataloader (see bdclean.types.ViewableData)."
        )
    return data


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps in one epoch of the view that the data module serves now."""
    batches = len(viewable_data(trainer).train_dataloader())
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole fit.

    Raises:
        ConfigError: If it has no end.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise ConfigError(
            "trainer.max_epochs=-1: the learning rate follows a schedule over the whole training, "
            "which needs an end; set trainer.max_epochs or trainer.max_steps."
        )
    return int(steps)


class FixedLength(LightningModule):
    """A fit that keeps its length when it is resumed; stands before other bases.

    Schedulers restore the length that they were made for, so a fit that became longer would go on
    at the end of its schedule, or beyond it.

    Attributes:
        stretchable: Whether nothing depends on the length.
    """

    stretchable = False
    _steps: float | None = None
    _steps_before: float | None = None

    def setup(self, stage: str) -> None:
        """A fit that resumes nothing may have any length."""
        super().setup(stage)
        self._steps_before = None

    def on_train_start(self) -> None:
        """Compares the length with that of the run that is resumed.

        Raises:
            ConfigError: If they differ.
        """
        super().on_train_start()
        before, self._steps = self._steps_before, self.trainer.estimated_stepping_batches
        if not self.stretchable and before not in (None, self._steps):
            raise ConfigError(
                f"The checkpoint's run is {before} steps long, and this one {self._steps}. Resume "
                "with what gave it that length (epochs or max_steps, devices, batch size), or "
                "start a new run from its weights (model.weights)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the length."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STEPS] = self._steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reads the length."""
        super().on_load_checkpoint(checkpoint)
        self._steps_before = checkpoint.get(_STEPS)


def own_optimizer(make: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """The optimizer that the user chose.

    Raises:
        ConfigError: If it refuses its settings.
    """
    try:
        return make(parameters)
    except ValueError as error:
        raise ConfigError(f"model.optimizer: {error}.") from error


def scheduled(
    trainer: Trainer,
    optimizer: Optimizer,
    schedule: Schedule,
    epochs: int,
    milestones: tuple[float, ...] = (0.5, 0.75),
) -> OptimizerLRSchedulerConfig:
    """An optimizer with a schedule per step over `epochs` epochs of the present view.

    Per step and never per epoch: Lightning steps epoch schedulers after `on_train_epoch_end`,
    where a staged method has put the next stage's scheduler in place already.
    """
    total = epochs * steps_per_epoch(trainer)
    scheduler = make_schedule(optimizer, schedule, total, milestones)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }


def scan(
    trainer: Trainer, view: View, device: torch.device, *, shared: bool = False
) -> Iterator[Batch]:
    """All rows of `view`, un-augmented, in the same order on every rank.

    Where they are `shared`, a rank gets its part of the batches only; see `together`.
    """
    data = viewable_data(trainer)
    for batch in data.reading_dataloader(view, shared=shared):
        yield data.device_batch(batch, device)


def num_rows(trainer: Trainer, view: View) -> int:
    """How many rows the view has, on all ranks together."""
    rows: Sized = viewable_data(trainer).reading_dataloader(view).dataset  # type: ignore[assignment]
    return len(rows)


def together(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Puts the values that the ranks have computed for their rows into one table.

    Args:
        values: (M, ...), of this rank.
        index: (M,), the row of each; no row on two ranks.
        size: Number of rows N.

    Returns:
        (N, ...), the same on all ranks; zero for rows that no rank has.
    """
    table = values.new_zeros(size, *values.shape[1:])
    table[index] = values
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(table)
    return table


def share_buffers(model: nn.Module) -> None:
    """Gives every process the buffers of the first one.

    DDP does so before each training step. After the last one, the running statistics of batch
    norm differ between devices, and with them whatever the model then computes.
    """
    if distributed.is_available() and distributed.is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
