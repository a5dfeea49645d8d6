"""A SLURM job that is requeued loses no step, and ends as if it had never been stopped."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bdclean.errors import counted
from bdclean.modules.trainer import is_fitting, is_trial, requeue_signal
from bdclean.runs import RunFolder

NAME = "hpc_ckpt_1.ckpt"
"""Of the checkpoint; Lightning gives each requeue a number."""


class Requeue(Callback):
    """Saves a fit between two steps, and requeues its job, when SLURM announces the time limit.

    Lightning's own handler saves at once, wherever the signal finds it. Within a step that is
    the state of no step at all. It saves tests as well, as if they were fits. Lightning leaves
    its handler out where the signal has one already, so this one is set up before it.

    Lightning reads a checkpoint of that name for any command that names none, also for the test
    after the fit. So it goes when the fit has ended.

    Args:
        folder: Of the run, and of no other; the Trainer's `default_root_dir`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._trainer: Trainer | None = None
        self._signal = signal.SIGUSR1
        self._asked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens, unless somebody else does."""
        number = requeue_signal(trainer)
        if number is None or is_trial(trainer) or signal.getsignal(number) != signal.SIG_DFL:
            return
        if threading.current_thread() is threading.main_thread():
            self._trainer, self._signal, self._asked = trainer, number, False
            signal.signal(number, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._trainer is None:  # the command has failed: nothing here is to be saved
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif is_fitting(self._trainer):
            self._asked = True
        elif self._trainer.is_global_zero:
            requeue_job("it measures again")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves before the next step."""
        self._answer(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after the last step."""
        self._answer(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what was saved, since the fit has ended."""
        if self._asked and trainer.is_global_zero:
            requeue_job("it measures again")
        if self._trainer is not None:
            signal.signal(self._signal, signal.SIG_DFL)
        self._trainer, self._asked = None, False
        if is_fitting(trainer) and not is_trial(trainer):
            if trainer.is_global_zero:
                for file in RunFolder(self.folder).of_requeues():
                    file.unlink()
            trainer.strategy.barrier("removed")  # no device may find it any more

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Listens no more; Lightning puts the handlers back that it has found."""
        self._trainer = None

    def _answer(self, trainer: Trainer) -> None:
        if self._trainer is None:
            return
        # The signal does not reach all devices before the same step.
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._asked = False
            save_and_requeue(trainer, self.folder / NAME)


def save_and_requeue(trainer: Trainer, file: Path) -> None:
    """Saves on all devices, and requeues the job. `bdclean.stopping` lets no SIGTERM end this."""
    for logger in trainer.loggers:
        logger.save()
    trainer.save_checkpoint(file)
    if trainer.is_global_zero:
        requeue_job(f"it goes on after {counted(trainer.global_step, 'step')}")


def requeue_job(then: str) -> None:
    """Has SLURM end this job and start it again; a job that it refuses goes on to its limit.

    Args:
        then: What the job does then, for the user.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        status = subprocess.call(["scontrol", "requeue", job])  # noqa: S603, S607
        told = f"The job {job} is requeued: {then}." if status == 0 else f"scontrol: {status}"
    except OSError as error:
        status, told = 1, f"scontrol: {error.strerror}"
    if status:
        told = f"The job {job} cannot be requeued ({told}), and works on until it is stopped."
    with suppress(OSError):  # a full disk under a log ends no training
        print(told, file=sys.stderr, flush=True)
