"""Images in memory, and the rows of them that a role reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bdclean.errors import ConfigError
from bdclean.types import Subset, TensorDict

_SETS = {
    "stored": "training images",
    "defense_set": "defence images",
    "test_set": "test images",
}
_NAMED = 20  # skipped files in a record


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory.

    Attributes:
        images: (N, 3, H, W), uint8.
        labels: (N,), int64; None for a folder of unlabelled images.
        files: Where each image came from, for reports; empty when it came from an archive.
        root: The folder of these files.
        classes: Names of the classes in the order of the labels; empty where they have none.
        skipped: Files that could not be read and are left out.
    """

    images: Tensor
    labels: Tensor | None
    files: tuple[str, ...] = field(default=(), repr=False)
    classes: tuple[str, ...] = field(default=(), repr=False)
    root: Path | None = None
    skipped: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


def labels_of(images: ImageSet) -> Tensor:
    """The labels (N,).

    Raises:
        ConfigError: If there are none.
    """
    if images.labels is None:
        raise ConfigError("This data set has no labels; it can only serve the defence role.")
    return images.labels


def skipped_files(sets: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of files that could not be read; empty where there are none.

    Args:
        sets: The sets of a data module that have been read, by the names of its attributes.
    """
    found = {}
    for name, words in _SETS.items():
        images = sets.get(name)
        if isinstance(images, ImageSet) and images.skipped:
            files = images.skipped
            found[words] = {"number": len(files), "first": list(files[:_NAMED])}
    return {"skipped": found} if found else {}


@dataclass(frozen=True)
class Overlay:
    """Images that replace some rows: what a fixed attack changes, and nothing else.

    Attributes:
        rows: (P,), positions in the role, ascending.
        images: (P, 3, H, W), uint8.
    """

    rows: Tensor
    images: Tensor


class RoleImages(Dataset[TensorDict]):
    """The rows of an image set that one role reads; whole batches at a time.

    The stored images are shared by all roles and never written to.

    Args:
        images: (N, 3, H, W), uint8.
        rows: (M,), which of them, in the role's order. `index` in a batch counts these.
        overlay: Poisoned versions of some of the rows.
        columns: More (M,) tensors to hand out by name, such as `label` and `target`.
    """

    def __init__(
        self,
        images: Tensor,
        rows: Tensor,
        overlay: Overlay | None = None,
        columns: TensorDict | None = None,
    ) -> None:
        self.images, self.rows, self.overlay = images, rows, overlay
        self.columns = columns or {}
        self._slot = torch.full((len(rows),), -1, dtype=torch.long)
        if overlay is not None:
            self._slot[overlay.rows] = torch.arange(len(overlay.rows))

    def __len__(self) -> int:
        """Number of rows of the role."""
        return len(self.rows)

    def __getitem__(self, row: int) -> TensorDict:
        """One row, without a batch dimension."""
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int] | Tensor) -> TensorDict:
        """A whole batch: `image` (B, 3, H, W) uint8, `index` (B,), and the columns."""
        index = torch.as_tensor(rows)
        batch = {"image": self.shown(index), "index": index}
        batch |= {name: column[index] for name, column in self.columns.items()}
        return batch

    def everything(self) -> TensorDict:
        """The whole role as one batch."""
        return self.__getitems__(torch.arange(len(self)))

    def clean(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The images of some rows beneath the overlay, a new uint8 (B, 3, H, W)."""
        return self.images[self.rows[torch.as_tensor(rows)]]

    def shown(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The images of some rows as batches have them, a new uint8 (B, 3, H, W)."""
        images = self.clean(rows)
        if self.overlay is not None:
            slot = self._slot[torch.as_tensor(rows)]
            poisoned = slot >= 0
            images[poisoned] = self.overlay.images[slot[poisoned]]
        return images


class ChosenRows(Dataset[TensorDict]):
    """Some rows of a role, perhaps with labels of a method's own; whole batches at a time.

    Args:
        role: All rows of the role.
        subset: The choice; its rows are positions in the role, and its labels, where it has any,
            stand in a batch in place of the data's.
    """

    def __init__(self, role: RoleImages, subset: Subset) -> None:
        self.role, self.subset = role, subset

    def __len__(self) -> int:
        """Number of rows chosen."""
        return len(self.subset.rows)

    def __getitem__(self, row: int) -> TensorDict:
        """One row, without a batch dimension."""
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> TensorDict:
        """A whole batch, as of the role; `index` counts the rows of the role."""
        chosen = torch.as_tensor(rows)
        batch = self.role.__getitems__(self.subset.rows[chosen])
        if self.subset.labels is not None:
            batch["label"] = self.subset.labels[chosen]
        return batch


Rows = RoleImages | ChosenRows
"""What a loader reads."""
