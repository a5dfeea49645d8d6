"""Everything that touches Lightning's Trainer and its loops; no other file does."""

import inspect
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from bdclean.checks import MOST_FLOAT
from bdclean.errors import ConfigError

# As if no limit was given: Lightning makes 1000 of None before `setup` is called, so that a given
# 1000 looks the same; -1 means "without end".
_UNLIMITED = (None, -1, 1000)
# Where 0 leaves nothing to do, and says so of a fit and a test that are done.
_LIMITS: dict[Any, tuple[str, ...]] = {
    TrainerFn.FITTING: ("limit_train_batches", "max_epochs", "max_steps"),
    TrainerFn.VALIDATING: ("limit_val_batches",),
    TrainerFn.TESTING: ("limit_test_batches",),
    TrainerFn.PREDICTING: ("limit_predict_batches",),
}
_COUNTED = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
_TUNERS = (BatchSizeFinder, LearningRateFinder)
_AVERAGES = (StochasticWeightAveraging, WeightAveraging)


def is_trial(trainer: Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`, which must leave no trace."""
    return bool(vars(trainer)["fast_dev_run"])


def is_fitting(trainer: Trainer) -> bool:
    """Whether the command is `fit`; its validation counts as well."""
    return trainer.state.fn == TrainerFn.FITTING


def uses_ddp(trainer: Trainer) -> bool:
    """Whether DDP waits for the gradients of every parameter that trains."""
    return isinstance(trainer.strategy, DDPStrategy)


def named_checkpoint(trainer: Trainer | None) -> str:
    """The option and the file of the checkpoint that is read, as the user types them."""
    path = None if trainer is None else trainer.ckpt_path
    return "--ckpt_path" if path is None else f"--ckpt_path {path}"


def ignore_eval_mode() -> None:
    """Silences Lightning's warning of modules in evaluation mode, where they are on purpose."""
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")


# ---------------------------------------------------------------- what is refused


def check_callbacks(trainer: Trainer, module: LightningModule, *, can_average: bool) -> None:
    """Refuses callbacks that would change a method without a word.

    Raises:
        ConfigError: If one trains before the method begins, or averages weights that do not
            belong together.
    """
    refused = _TUNERS if can_average else _TUNERS + _AVERAGES
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, refused):
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} does not fit "
                f"{type(module).__name__}: it trains before the method begins, or averages "
                "networks that do not belong together; leave it out."
            )


def check_precision(trainer: Trainer) -> None:
    """Refuses half precision of the weights.

    Raises:
        ConfigError: If trainer.precision is bf16-true or 16-true.
    """
    precision = trainer.precision
    if precision in ("bf16-true", "16-true"):
        raise ConfigError(
            f"trainer.precision={precision}: images and losses are float32, so "
            "the weights must be as well; take bf16-mixed (or 16-mixed), or 32-true."
        )


def check_limits(trainer: Trainer) -> None:
    """Refuses limits under which a command would do nothing, and say that it is done.

    Raises:
        ConfigError: If one is 0, or no number.
    """
    for key in _LIMITS.get(trainer.state.fn, ()):
        value = getattr(trainer, key)
        if value == 0:
            raise ConfigError(f"trainer.{key}={value}: it must be above 0, or nothing is done.")
    for key in _COUNTED:
        value = getattr(trainer, key)
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"trainer.{key}={value}: it must be above 0.")
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise ConfigError(
            f"trainer.gradient_clip_val={clip}: it must be a finite number, 0 or above."
        )


def check_unused(trainer: Trainer) -> None:
    """Refuses a Trainer that has fitted before.

    Raises:
        ConfigError: If it has; it would train no further epoch.
    """
    if trainer.current_epoch:
        raise ConfigError(
            f"This Trainer has trained {trainer.current_epoch} epochs already; make a "
            "new Trainer for a new fit."
        )


def check_reloading(trainer: Trainer, module: LightningModule) -> None:
    """Makes sure that every epoch gets a new loader, since later stages read other images.

    Raises:
        ConfigError: If trainer.reload_dataloaders_every_n_epochs is not 1.
    """
    every = getattr(trainer, "reload_dataloaders_every_n_epochs")  # noqa: B009  (untyped)
    if every != 1:
        raise ConfigError(
            f"trainer.reload_dataloaders_every_n_epochs={every}: "
            f"{type(module).__name__} reads other images in later stages; set it to 1, with "
            "--trainer.reload_dataloaders_every_n_epochs 1 or -c and a config of the method, as "
            "`bdclean config ls` lists them."
        )


# ---------------------------------------------------------------- length


def set_max_epochs(trainer: Trainer, epochs: int) -> None:
    """Makes the fit last `epochs` epochs, the method's own number.

    Called in `setup("fit")`, after Trainer has parsed its limits. A development run
    (`fast_dev_run`) keeps its limit.

    Raises:
        ConfigError: If trainer.max_epochs was given and differs; a given 1000 passes for none.
    """
    if is_trial(trainer):
        return
    given = trainer.fit_loop.max_epochs
    if given not in _UNLIMITED and given != epochs:
        raise ConfigError(
            f"trainer.max_epochs={given}, but the method's own settings add up to {epochs} epochs. "
            f"Leave trainer.max_epochs at -1 (or set it to {epochs}), and change the epochs of the "
            "method."
        )
    trainer.fit_loop.max_epochs = epochs


def ended_early(trainer: Trainer) -> bool:
    """Whether the epoch that ends here lacks batches: max_steps, max_time ... have ended it."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return 0 < done < trainer.num_training_batches


def reopen_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Has a resumed run go on within an epoch that was cut short; Lightning calls it done."""
    if "loops" not in checkpoint:  # absent where weights alone are saved
        return
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    if ended_early(trainer) and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for progress in epochs.values():
            progress["processed"] = progress["completed"] = progress["ready"] - 1


def close_epoch(trainer: Trainer) -> None:
    """Tells the loop of a resumed run that the present epoch is over.

    It compares the batches done, of the old loader, with the length of the new one.
    """
    trainer.fit_loop.epoch_loop.batch_progress.current.completed = sys.maxsize


def reduce_logged(trainer: Trainer) -> None:
    """Has every rank reduce what was logged, before the ranks exchange anything else.

    A progress display has done so, but on rank 0 alone.
    """
    _ = trainer.callback_metrics


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


def steps_of(trainer: Trainer, batches: int) -> int:
    """Optimizer steps in an epoch of so many batches."""
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


# ---------------------------------------------------------------- optimizers


def setup_optimizers(trainer: Trainer) -> None:
    """Replaces the optimizers by those that `configure_optimizers` makes now."""
    trainer.strategy.setup_optimizers(trainer)


def user_optimizer(make: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """The optimizer that the user chose.

    Raises:
        ConfigError: If it refuses its settings, one of them is no finite number or too large, or
            it computes the loss several times in a step.
    """
    try:
        optimizer = make(parameters)
    except ValueError as error:
        raise ConfigError(f"model.optimizer: {str(error).rstrip('.')}.") from error
    for key, value in optimizer.defaults.items():
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(math.isfinite(each) for each in numbers if isinstance(each, float)):
            raise ConfigError(f"model.optimizer.{key}={value}: it must be a finite number.")
        if any(isinstance(each, float) and abs(each) > MOST_FLOAT for each in numbers):
            raise ConfigError(f"model.optimizer.{key}={value}: it must be at most {MOST_FLOAT:g}.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: it computes the loss several times in a "
            "step, which a training in batches cannot serve; take another one, as torch.optim.SGD."
        )
    return optimizer
