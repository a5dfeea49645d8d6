"""Ends a training that diverges, before a checkpoint or a product is made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bdclean.errors import DivergedError
from bdclean.functional.finite import odd_tensor
from bdclean.modules.trainer import reduce_logged

_UNKNOWN = -1


class StaysFinite(Callback):
    """Refuses to go on with a loss or with weights that are NaN or infinite.

    A network of NaN answers every image with class 0, so that it looks like a defence that has
    removed the backdoor. On the CPU the loss of every step is looked at. On other devices a flag
    stays there, which is read when an epoch ends or a checkpoint is written.
    """

    def __init__(self) -> None:
        self._step: Tensor | None = None  # the first one with such a loss

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the loss of the step.

        Raises:
            DivergedError: If it is not finite, on one CPU.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        step = loss.new_full((), trainer.global_step, dtype=torch.long)
        known = step.new_full((), _UNKNOWN) if self._step is None else self._step
        is_first = ~loss.detach().isfinite().all() & (known == _UNKNOWN)
        self._step = torch.where(is_first, step, known)
        if loss.device.type == "cpu" and trainer.world_size == 1 and is_first:
            self._refuse(trainer, f"the loss of step {trainer.global_step} is not finite")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the losses of the epoch and at the weights.

        Raises:
            DivergedError: If one of them is not finite.
        """
        self._require(trainer, pl_module, together=True)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the last good checkpoint from being replaced.

        Raises:
            DivergedError: As `on_train_epoch_end`.
        """
        self._require(trainer, pl_module, together=False)

    def _require(self, trainer: Trainer, module: LightningModule, *, together: bool) -> None:
        what = ""
        if self._step is not None and self._step != _UNKNOWN:
            what = f"the loss of step {int(self._step)} is not finite"
        elif (name := odd_tensor(dict(module.named_parameters()))) is not None:
            what = f"the weights {name} are not finite after step {trainer.global_step}"
        odd = bool(what)
        if together:  # one device alone must not stop: the others would wait for it
            reduce_logged(trainer)
            odd = trainer.strategy.reduce_boolean_decision(odd, all=False)
        if odd:
            self._refuse(trainer, what or "the loss of another device is not finite")

    def _refuse(self, trainer: Trainer, what: str) -> None:
        last = getattr(trainer.checkpoint_callback, "best_model_path", "")
        kept = f" The last good checkpoint is {last}." if last and Path(last).is_file() else ""
        raise DivergedError(
            f"The training has diverged: {what}. Nothing was made of it; lower the learning rate, "
            f"or look at what else was changed.{kept}"
        )


def check_outputs(trainer: Trainer, odd: Tensor) -> None:
    """Refuses to count answers that are none.

    Args:
        trainer: Of the evaluation.
        odd: Whether an output on this device was NaN or infinite.

    Raises:
        DivergedError: If one was, on any device.
    """
    if trainer.strategy.reduce_boolean_decision(bool(odd), all=False):
        raise DivergedError(
            "The model answers test images with numbers that are not finite, so nothing was "
            "measured: its training has diverged, or its weights are damaged."
        )
