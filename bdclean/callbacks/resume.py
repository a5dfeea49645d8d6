"""What makes a killed and restarted run end with the weights it would have had.

Three parts: checkpoints are written atomically, loaders continue at the right batch
(`bdclean.data.loading`), and every random number of a training step is a function of
(seed, step, rank). The last one makes stored random states unnecessary: there is nothing to
restore, on any number of devices.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from bdclean.errors import ConfigError
from bdclean.files import replacing
from bdclean.functional.seeds import derive_seed, global_seed
from bdclean.types import ResumableLoader


class ExactResume(Callback):
    """Starts a resumed epoch at its next batch, and seeds every training step anew."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the loader where the checkpoint was written.

        Lightning restores the loader's own state only when the loader is built after the
        checkpoint is read; one that was built early, to count the steps of a schedule, would
        begin the epoch anew.
        """
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            loader.start_at(ready % len(loader))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds what a step draws (dropout, random starts) from (seed, epoch, step, rank)."""
        seed = global_seed() or 0
        epoch = trainer.current_epoch
        torch.manual_seed(derive_seed("step", seed, epoch, batch_idx, trainer.global_rank))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place and renames it, so that it is whole or absent.

    Reads local files alone, and never unpickles them.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves `checkpoint` at `path`.

        Raises:
            ConfigError: If storage options are given; they belong to other storages.
            FileError: If the file cannot be written.
        """
        if storage_options is not None:
            raise ConfigError("Checkpoints are written to local files; leave out storage_options.")
        with replacing(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch's own error hides a full disk
                    raise error.__context__ from error
                raise

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: Any = None
    ) -> dict[str, Any]:
        """Reads a checkpoint of a run.

        Raises:
            ConfigError: If it is no local file, is none of Lightning's, or would need unpickling.
        """
        if weights_only is False:
            raise ConfigError("Checkpoints are never unpickled; leave out weights_only.")
        if not Path(path).is_file():  # Lightning would unpickle what a URL gives
            raise ConfigError(f"--ckpt_path {path}: there is no such file on this machine.")
        try:
            checkpoint: dict[str, Any] = torch.load(
                path, map_location=map_location, weights_only=True
            )
        except Exception as error:  # damaged bytes can end anywhere in torch's unpickler
            # The first sentence alone: torch goes on with advice to switch the safe loading off.
            told = re.split(r"\.\s|\n", str(error).strip())[0][:200] or type(error).__name__
            raise ConfigError(
                f"--ckpt_path {path} is not a readable checkpoint ({told})."
            ) from error
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            raise ConfigError(
                f"--ckpt_path {path} is no checkpoint of a run; give a weights file as "
                "--model.weights."
            )
        return checkpoint
