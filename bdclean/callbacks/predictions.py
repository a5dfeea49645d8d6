"""Writes what `predict` computed: features and logits of every image."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, distributed

from bdclean.callbacks.writing import run_to_write
from bdclean.modules.reading import loader_names
from bdclean.weights import write


class PredictionFiles(BasePredictionWriter):
    """One `predictions-NAME.safetensors` per evaluation set, rows in stored order.

    Each holds `index` (N,), `features` (N, D) and, when the model has a head, `logits` (N, K).

    Args:
        folder: Where to write; None takes the logger's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Collects the parts of all processes and writes the files on the first one."""
        run = run_to_write(trainer, self.folder)
        written = []
        loaders = predictions if isinstance(predictions[0], list) else [predictions]
        for name, batches in zip(loader_names(trainer), loaders, strict=False):
            columns = _merge(list(batches))
            if run is not None:
                path = run.predictions(name)
                write(columns, path, {})
                written.append(f"{path.name} ({len(columns['index']):,} images)")
        if run is not None:
            print(f"Written to {run.path}: {', '.join(written)}")


def _merge(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    mine = {key: torch.cat([b[key].cpu() for b in batches]) for key in batches[0]}
    parts: list[Any] = [mine]
    if distributed.is_available() and distributed.is_initialized():
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, mine)
    merged = {key: torch.cat([part[key] for part in parts]) for key in mine}
    order = merged["index"].argsort()
    return {key: value[order].contiguous() for key, value in merged.items()}
