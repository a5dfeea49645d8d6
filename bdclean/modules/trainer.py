"""Everything that touches Lightning's Trainer and its loops; no other file does."""

import math
import signal
import warnings
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bdclean.errors import ConfigError, counted

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
_CHOOSERS = (BaseFinetuning, ModelPruning)


def is_trial(trainer: Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`, which must leave no trace."""
    return bool(vars(trainer)["fast_dev_run"])


def is_fitting(trainer: Trainer) -> bool:
    """Whether the command is `fit`; its validation counts as well."""
    return trainer.state.fn == TrainerFn.FITTING


def uses_ddp(trainer: Trainer) -> bool:
    """Whether DDP waits for the gradients of every parameter that trains."""
    return isinstance(trainer.strategy, DDPStrategy)


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """What SLURM sends to a job that is to be requeued; None where no such job runs."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def has_validated(trainer: Trainer) -> bool:
    """Whether the validation has had its turn, if there is one, at the end of an epoch."""
    every = trainer.check_val_every_n_epoch or 1
    return not sum(trainer.num_val_batches) or trainer.current_epoch + 1 >= every


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """The checkpoint that Lightning is about to restore; None of a new run."""
    return trainer._checkpoint_connector._loaded_checkpoint or None


def loop_state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint keeps of the loops of a fit, without that of its loaders."""
    return {"fit_loop": trainer.fit_loop.state_dict() | {"state_dict": {}}}


def counted_steps(loops: dict[str, Any]) -> int:
    """How many steps of optimizers a `loop_state` has counted."""
    fit = loops["fit_loop"]
    automatic = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    manual = fit["epoch_loop.manual_optimization.optim_step_progress"]
    return sum(int(each["total"]["completed"]) for each in (automatic, manual))


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
        if isinstance(callback, GradientAccumulationScheduler):
            raise ConfigError(
                "trainer.callbacks: GradientAccumulationScheduler changes how many steps an epoch "
                "has, on which schedules and an exact resume stand; take "
                "--trainer.accumulate_grad_batches."
            )
        if isinstance(callback, _CHOOSERS):
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} does not fit "
                f"{type(module).__name__}, which chooses itself which weights it trains; leave it "
                "out."
            )
        if isinstance(callback, OnExceptionCheckpoint) or (
            isinstance(callback, ModelCheckpoint) and callback.save_on_exception
        ):
            # The refusal is an exception as well, at which it would save.
            vars(trainer)["callbacks"].remove(callback)
            raise ConfigError(
                f"{type(callback).__name__}: it would save a step that was cut short, from which "
                "no run goes on exactly; leave it out (--checkpoint.save_on_exception false)."
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
    overfit = vars(trainer)["overfit_batches"]
    if overfit:
        raise ConfigError(
            f"trainer.overfit_batches={overfit}: it takes the shuffling away that "
            "the order of images and an exact resume stand on; take --trainer.limit_train_batches."
        )
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
            f"This Trainer has trained {counted(trainer.current_epoch, 'epoch')} already; make a "
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
            f"trainer.max_epochs={given}, but the method's own settings add up to "
            f"{counted(epochs, 'epoch')}. "
            f"Leave trainer.max_epochs at -1 (or set it to {epochs}), and change the epochs of the "
            "method."
        )
    trainer.fit_loop.max_epochs = epochs


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
    """Optimizer steps in an epoch of so many batches.

    Raises:
        ConfigError: If trainer.val_check_interval is longer than the epoch.
    """
    limit, every = trainer.limit_train_batches, trainer.val_check_interval
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    by_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches != 0
    if by_epoch and isinstance(every, int) and every > batches:
        raise ConfigError(
            f"trainer.val_check_interval={every}: an epoch has "
            f"{counted(batches, 'batch', 'batches')}; take that many "
            "or fewer, or set --trainer.check_val_every_n_epoch null."
        )
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


# ---------------------------------------------------------------- where a fit is


def batches_done(trainer: Trainer) -> int:
    """The batches of the present epoch whose steps are done; 0 between two epochs.

    Of Lightning's counters, `ready` has a batch that was only fetched, and `completed` lacks one
    while `on_train_batch_end` runs. The last epoch's batches stay in them until the next begins.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    done: int = batches.current.processed
    if epochs.started < epochs.ready:  # `on_train_epoch_start` runs
        return 0
    if epochs.processed < epochs.ready:
        return done
    is_whole = batches.is_last_batch or done >= trainer.num_training_batches
    return 0 if is_whole else done


def ended_early(trainer: Trainer) -> bool:
    """Whether the epoch that ends here lacks batches: max_steps, max_time ... have ended it."""
    return batches_done(trainer) > 0


def keep_place(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Writes into a checkpoint where the fit is, in one of two forms that Lightning goes on from.

    Lightning keeps its counters as they are within the hook that saves, and guesses from them
    where to go on. It calls an epoch done that max_steps has cut short, skips a validation that
    was due after the step, or repeats the end of an epoch. Here a fit is either between two
    epochs, or after a batch of one, its last one perhaps; see `go_on`.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs: Any = fit.epoch_progress.current
    batches: Any = loop.batch_progress
    done, total = batches_done(trainer), batches.total.processed
    validates = done > 0 and _validates_after(trainer, done, total)
    # a validation that is due, but was not begun, stands as one within which the fit was stopped
    is_within = epochs.processed < epochs.ready and batches.current.ready == done
    is_due = validates and is_within and not trainer.validating
    ended = epochs.ready - 1 if done else epochs.processed
    stepped = loop.global_step if trainer.lightning_module.automatic_optimization else total
    state = checkpoint["loops"]["fit_loop"]
    for counts in state["epoch_progress"].values():
        if done:
            counts |= {"ready": ended + 1, "started": ended + 1}
            counts |= {"processed": ended, "completed": ended}
        else:
            counts |= dict.fromkeys(("ready", "started", "processed"), ended)
            counts["completed"] = max(0, ended - 1)  # so that the next epoch gets its own loader
    counts = state["epoch_loop.batch_progress"]
    counts["total"] = dict.fromkeys(counts["total"], total)
    counts["current"] = dict.fromkeys(counts["current"], done)
    counts["is_last_batch"] = done >= trainer.num_training_batches
    counts = state["epoch_loop.val_loop.batch_progress"]
    counts["total"] = dict.fromkeys(counts["total"], 0)
    counts["total"] |= {"ready": int(is_due), "started": int(is_due)}
    counts["current"] = dict.fromkeys(counts["current"], 0)
    # for loggers; Lightning adds the last one again where it finds that a validation was due
    again = validates and not _accumulates_after(trainer, done)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped - again


def go_on(trainer: Trainer) -> int:
    """Has the loops go on where the checkpoint was written; called when the training starts.

    Under max_steps Lightning takes each resumed epoch for one that was stopped within, and counts
    the end of the last one again. After the last batch of an epoch it asks for one more.

    Returns:
        The batches of the present epoch that are done.
    """
    fit, done = trainer.fit_loop, batches_done(trainer)
    if done == 0:
        epochs: Any = fit.epoch_progress
        for counts in (epochs.total, epochs.current):
            counts.completed = counts.processed
        fit._restarting = fit.epoch_loop.restarting = False
        fit.reset_restart_stage()
    elif done >= trainer.num_training_batches and fit._data_fetcher is not None:
        fit._data_fetcher.done = True
    return done


def pending_gradients(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """What the next optimizer step goes on with, within accumulate_grad_batches.

    Returns:
        The gradients (W, ...) of W devices by the names of their parameters.
    """
    if not _accumulates_after(trainer, batches_done(trainer)):
        return {}
    named = {n: p.grad.detach() for n, p in module.named_parameters() if p.grad is not None}
    if trainer.world_size == 1:
        return {name: gradient[None] for name, gradient in named.items()}
    return {name: trainer.strategy.all_gather(gradient) for name, gradient in named.items()}


def stop_again(trainer: Trainer) -> None:
    """Ends a fit that EarlyStopping had ended when its checkpoint was written.

    Lightning forgets that, and would train one more epoch.
    """
    stoppers = (each for each in vars(trainer)["callbacks"] if isinstance(each, EarlyStopping))
    if any(each.stopping_reason_message is not None for each in stoppers):
        trainer.should_stop = True


def _validates_after(trainer: Trainer, done: int, total: int) -> bool:
    """Whether a validation is due after so many batches of the epoch, and of the fit."""
    every = vars(trainer).get("val_check_batch")
    epochs = trainer.check_val_every_n_epoch
    if every is None or math.isinf(every):  # by the clock, or an epoch of unknown length
        return False
    count = total if epochs is None else done
    return trainer.fit_loop.epoch_loop._should_check_val_epoch() and count % every == 0


def _accumulates_after(trainer: Trainer, done: int) -> bool:
    """Whether the optimizer has not stepped yet on the last of so many batches of the epoch."""
    return done % trainer.accumulate_grad_batches > 0 and done < trainer.num_training_batches


def setup_optimizers(trainer: Trainer) -> None:
    """Replaces the optimizers by those that `configure_optimizers` makes now."""
    trainer.strategy.setup_optimizers(trainer)
