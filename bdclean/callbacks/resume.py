"""What makes a killed and restarted run end with the weights it would have had.

Three parts: checkpoints are written atomically, loaders continue at the right batch
(`bdclean.data.loading`), and every random number of a training step is a function of
(seed, step, rank). The last one makes stored random states unnecessary: there is nothing to
restore, on any number of devices.
"""

import os
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bdclean.errors import ConfigError, WeightsError, counted
from bdclean.files import replacing, sha256_of_file
from bdclean.functional.seeds import derive_seed, global_seed
from bdclean.modules.checkpoints import check_parts, check_there, named, none_of_ours
from bdclean.modules.reading import data_of
from bdclean.modules.trainer import (
    go_on,
    is_trial,
    keep_place,
    pending_gradients,
    stop_again,
)
from bdclean.printable import printable
from bdclean.types import HasIdentity, ResumableLoader
from bdclean.weights.bounds import check_nests, check_torch_file, damaged, refused

_SAMPLES = ("training images", "poison plan")  # of `HasIdentity`; sifters compare each sample


class ExactResume(Callback):
    """Starts a resumed epoch at its next batch, and seeds every training step anew.

    Checkpoints keep what tells the run's images, poison plan and weights files from others. A run
    goes on with the same ones only. Hyper-parameters of the module name its weights files where
    none are given.

    Args:
        files: Weights files that the run reads, by the keys that users type.
    """

    def __init__(self, files: Mapping[str, str] | None = None) -> None:
        self.files = files
        self._made_of: dict[str, str] = {}
        self._before: Any = None
        self._resumed_from: str | None = None
        self._gradients: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the run is made of."""
        return {"made_of": dict(self._made_of)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the run that is resumed was made of, and what its next step goes on with."""
        self._before = state_dict.get("made_of")
        self._gradients = state_dict.get("gradients", {})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds where the fit is, and the gradients that its next step goes on with."""
        keep_place(trainer, checkpoint)
        gradients = pending_gradients(trainer, pl_module)
        checkpoint["callbacks"][self.state_key]["gradients"] = gradients

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares what the run is made of with what the checkpoint says.

        Raises:
            ConfigError: If the images, the poison plan or a weights file is another.
        """
        self._resumed_from = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        if is_trial(trainer):
            return
        stop_again(trainer)
        self._made_of = self._find(trainer, pl_module)
        before, self._before = self._before, None
        if self._resumed_from is None or before is None:
            return
        if not isinstance(before, Mapping) or not all(isinstance(name, str) for name in before):
            told = none_of_ours("what it says that the run is made of is odd")
            raise ConfigError(f"{named(self._resumed_from)}: {told}")
        others = [
            f"{name}: {before.get(name, 'none')} -> {self._made_of.get(name, 'none')}"
            for name in sorted(before.keys() | self._made_of.keys())
            if before.get(name) != self._made_of.get(name)
            and not (name in _SAMPLES and getattr(pl_module, "compares_samples", False))
        ]
        if others:
            raise ConfigError(
                f"{named(self._resumed_from)}: the run began with others of these: "
                f"{'; '.join(others)}; bring them back as they were, or start a new run with --run."
            )

    def _find(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        data = data_of(trainer)
        found = data.identity() if isinstance(data, HasIdentity) else {}
        own = {"model.weights": str(module.hparams.get("weights"))}
        for key, name in (own if self.files is None else self.files).items():
            if Path(name).expanduser().is_file():
                found[f"--{key}"] = f"sha256 {sha256_of_file(Path(name).expanduser())[:16]}"
        return found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells loops and loader where the checkpoint was written, and the user where that is.

        Lightning restores the loader's own state only when the loader is built after the
        checkpoint is read; one that was built early, to count the steps of a schedule, would
        begin the epoch anew. It clears all gradients just before.
        """
        done = go_on(trainer)
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            loader.start_at(done)
        if not isinstance(self._gradients, Mapping):
            raise ConfigError(
                f"{named(self._resumed_from)}: {none_of_ours('its gradients are odd')}"
            )
        for name, parameter in pl_module.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradient(name, parameter, trainer)
        self._gradients = {}
        if self._resumed_from is not None:
            stage = getattr(pl_module, "stage_name", None)
            epochs = trainer.max_epochs
            of = f" of {epochs}" if epochs is not None and epochs > 0 else ""
            self._say(
                trainer,
                f"Goes on from {printable(self._resumed_from)}: "
                f"{f'stage {stage}, ' if stage else ''}epoch "
                f"{trainer.current_epoch + 1}{of}, after {counted(trainer.global_step, 'step')}.",
            )

    def _gradient(self, name: str, parameter: Tensor, trainer: Trainer) -> Tensor:
        whole, shape = self._gradients[name], (trainer.world_size, *parameter.shape)
        if not isinstance(whole, Tensor) or whole.shape != shape:
            raise ConfigError(
                f"{named(self._resumed_from)}: {none_of_ours(f'its gradient of {name} is odd')}"
            )
        return whole[trainer.global_rank].to(parameter.device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if there was nothing left to train."""
        if self._resumed_from is not None:
            self._say(
                trainer, f"{printable(self._resumed_from)}: this run has ended; nothing is trained."
            )

    def _say(self, trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero:
            with suppress(OSError):  # a full disk under a log ends no training
                print(text, file=sys.stderr, flush=True)
        self._resumed_from = None

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
        file = named(path)
        if weights_only is False:
            raise ConfigError("Checkpoints are never unpickled; leave out weights_only.")
        check_there(path)
        try:
            check_torch_file(Path(path), file, is_ours=True)
            checkpoint: dict[str, Any] = torch.load(
                path, map_location=map_location, weights_only=True
            )
            check_nests(checkpoint, file)
        except WeightsError as error:
            raise ConfigError(str(error)) from error
        except pickle.UnpicklingError as error:
            raise ConfigError(refused(file, str(error), is_ours=True)) from error
        except Exception as error:  # damaged bytes can end anywhere in torch's unpickler
            raise ConfigError(damaged(file, error, is_ours=True)) from error
        check_parts(checkpoint, file)
        return checkpoint
