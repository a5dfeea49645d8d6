"""How modules read: views of the data module, whole passes, and sums over the ranks."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, distributed, nn

from bdclean.errors import ConfigError
from bdclean.modules.trainer import steps_of
from bdclean.types import Batch, View, ViewableData


def data_of(trainer: Trainer) -> Any:
    """The data module, whatever it is; None where the Trainer was given loaders."""
    return getattr(trainer, "datamodule", None)


def viewable_data(trainer: Trainer) -> ViewableData:
    """The data module.

    Raises:
        ConfigError: If there is none, or it cannot serve views.
    """
    data = data_of(trainer)
    if not isinstance(data, ViewableData):
        raise ConfigError(
            f"data={type(data).__name__}: the method chooses what it reads, so it needs a data "
            "module with set_view and reading_dataloader (see bdclean.types.ViewableData)."
        )
    return data


def loader_names(trainer: Trainer) -> tuple[str, ...]:
    """Names of the evaluation loaders, in their order."""
    return "clean", "triggered", *getattr(data_of(trainer), "further_tests", ())


def read(
    trainer: Trainer, view: View, device: torch.device, *, shared: bool = False
) -> Iterator[Batch]:
    """All rows of `view`, un-augmented, in the same order on every rank.

    Where they are `shared`, a rank gets its part of the batches only; see `gather_rows`.
    """
    data = viewable_data(trainer)
    for batch in data.reading_dataloader(view, shared=shared):
        yield data.device_batch(batch, device)


def num_rows(trainer: Trainer, view: View) -> int:
    """How many rows the view has, on all ranks together."""
    return viewable_data(trainer).num_rows(view)


def steps_per_epoch(trainer: Trainer, view: View) -> int:
    """Optimizer steps in one epoch of the view."""
    return steps_of(trainer, viewable_data(trainer).num_batches(view))


def gather_rows(values: Tensor, index: Tensor, size: int) -> Tensor:
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


def of_all_devices(module: LightningModule, values: Tensor) -> Tensor:
    """The rows of all devices in the order of their ranks, with gradients.

    A loss over them has the gradient, averaged over the devices as DDP does, that one device would
    compute from the whole batch.

    Args:
        module: Computes the loss.
        values: (B, ...), as many on every device.

    Returns:
        (W * B, ...) for W devices.
    """
    if module._trainer is None or module.trainer.world_size == 1:
        return values
    gathered = module.all_gather(values, sync_grads=values.requires_grad)
    assert isinstance(gathered, Tensor)  # noqa: S101
    return gathered.flatten(0, 1)
