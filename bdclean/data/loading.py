"""Loaders whose order and randomness depend only on (seed, epoch, step, rank)."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler

from bdclean.data.images import Rows
from bdclean.errors import ConfigError, counted
from bdclean.functional.seeds import derive_seed
from bdclean.types import Batch, BatchPlace


def _whole_batch(batch: Any) -> Any:
    """The data set hands out whole batches already."""
    return batch


class TrainLoader(DataLoader[dict[str, Any]]):
    """A shuffling loader that can be stopped and continued at any batch.

    The order is a function of (seed, epoch), the same on every rank, and so are the images of a
    step, which the devices share. Each batch carries `draw`, a seed for its augmentation that
    depends on (seed, epoch, step, rank), and `place`. Lightning stores `state_dict` in its
    checkpoints, so a resumed epoch starts at the right batch.

    Args:
        dataset: The rows to read.
        batch_size: Images per step on all devices together; a multiple of `world_size`.
        drop_last: Leave out an incomplete last batch. One of a single image is always left out.
        seed: Seed of order and augmentation.
        world_size: Number of devices in all.
        rank: This device's number.

    Raises:
        ConfigError: If the devices cannot share a batch equally.
    """

    def __init__(
        self,
        dataset: Rows,
        *,
        batch_size: int,
        drop_last: bool = False,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ConfigError(
                f"batch_size={batch_size}: {world_size} devices share each batch, so it must be a "
                f"multiple of {world_size}."
            )
        # A seed of its own: the same number as an attack's or a split's would draw the same
        # permutation, and the first epoch would begin with all the poison.
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset,
            num_replicas=world_size,
            rank=rank,
            shuffle=True,
            seed=derive_seed("order", seed) >> 1,
        )
        share = batch_size // world_size
        # Batch norm cannot train on a single image; the next epoch's order leaves out another one.
        one_is_left = len(sampler) > share and len(sampler) % share == 1
        super().__init__(
            dataset,
            batch_size=share,
            sampler=sampler,
            drop_last=drop_last or one_is_left,
            collate_fn=_whole_batch,
            pin_memory=torch.cuda.is_available(),
        )
        self._seed, self._batch_size = seed, batch_size
        self._rank, self._world_size = rank, world_size
        self._start = self._done = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Batches from where the loader was told to start, with their draw."""
        start, self._start = self._start, 0
        epoch = self.sampler.epoch  # type: ignore[attr-defined]
        for step, batch in enumerate(islice(super().__iter__(), start, None), start):
            self._done = step + 1
            draw = derive_seed(self._seed, epoch, step, self._rank)
            place = BatchPlace(step * self._batch_size, self._rank, self._world_size)
            yield batch | {"draw": draw, "place": place}

    def state_dict(self) -> dict[str, int]:
        """How many batches of the present epoch have been handed out."""
        return {"done": self._done % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next epoch begin after the batches already done."""
        self.start_at(state["done"])

    def start_at(self, step: int) -> None:
        """Makes the next epoch begin at batch `step`."""
        self._start = self._done = step


def evaluation_loader(
    dataset: Rows, *, batch_size: int, world_size: int = 1, rank: int = 0
) -> DataLoader[dict[str, Any]]:
    """A loader in stored order that shows every row exactly once over all devices.

    Raises:
        ConfigError: If there are images, but fewer than devices.
    """
    if 0 < len(dataset) < world_size:
        raise ConfigError(
            f"A set of {counted(len(dataset), 'image')} cannot be evaluated on {world_size} "
            "devices; evaluate "
            "on one (--trainer.devices 1)."
        )
    sampler: UnrepeatedDistributedSampler | None = None
    if world_size > 1:
        sampler = UnrepeatedDistributedSampler(
            dataset, num_replicas=world_size, rank=rank, shuffle=False
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        shuffle=False,
        collate_fn=_whole_batch,
        pin_memory=torch.cuda.is_available(),
    )


def reading_loader(
    dataset: Rows, *, batch_size: int, world_size: int = 1, rank: int = 0
) -> DataLoader[dict[str, Any]]:
    """A loader in stored order whose batches do not depend on the number of devices.

    Device `rank` gets the batches `rank`, `rank + world_size`, ...; each row exactly once over
    all devices.
    """
    batches = [
        list(range(start, min(start + batch_size, len(dataset))))
        for start in range(0, len(dataset), batch_size)
    ]
    return DataLoader(
        dataset,
        batch_sampler=batches[rank::world_size],
        collate_fn=_whole_batch,
        pin_memory=torch.cuda.is_available(),
    )


def to_float(batch: dict[str, Any]) -> Batch:
    """Images to float32 in [0, 1], channels last."""
    image = batch["image"].to(torch.float32, memory_format=torch.channels_last).div_(255)
    ready: Batch = {"image": image, "index": batch["index"]}
    if "label" in batch:
        ready["label"] = batch["label"]
    if "target" in batch:
        ready["target"] = batch["target"]
    return ready
