"""The shapes that travel between rooms: batches, views of the data, and protocols.

Images travel as uint8 to the device and as float32 in [0, 1] on it (pixel space).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bdclean.checks import check_least, check_not_negative

Role = Literal["train", "defense", "probe"]
"""What images a `fit` stage reads: the (possibly poisoned) training set, the clean images
that a defender holds, or the small labelled set of the linear probe."""

AugmentationName = Literal[
    "none", "crop", "weak", "simclr", "simclr_blur", "imagenet", "wanet", "physical"
]
"""Names that `bdclean.data.augment.RECIPES` has."""

TensorDict = dict[str, Tensor]
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ImageFacts:
    """Facts of a data set that a module has to know; the command line links them.

    Attributes:
        num_classes: K.
        input_size: Side of the images, in pixels.
        mean: Of the training images per channel, in [0, 1].
        std: As `mean`.
    """

    num_classes: int
    input_size: int
    mean: RGB
    std: RGB


class Batch(TypedDict):
    """One batch, as a step of a module receives it.

    `label` is present only where the role may see labels, so that a label-free method that
    reads it dies with a KeyError. `views` is present for contrastive stages; `target` (the
    label that the attack wants) only in triggered evaluation batches.
    """

    image: Tensor  # (B, 3, H, W), float32 in [0, 1]
    index: Tensor  # (B,), row of the role's set
    views: NotRequired[tuple[Tensor, ...]]  # each (B, 3, H, W), float32 in [0, 1]
    label: NotRequired[Tensor]  # (B,)
    target: NotRequired[Tensor]  # (B,)


@dataclass(frozen=True, eq=False)
class Subset:
    """Rows that a method has chosen itself, with the labels that it gives them.

    Attributes:
        rows: (M,), positions in the role, int64.
        labels: (M,), the method's own; None keeps those of the data. Batches carry them as
            `label` whatever the view says of labels, and the data's are not read at all. So a
            method may label images whose labels are hidden from it, or that have none.
    """

    rows: Tensor
    labels: Tensor | None = None


class BatchPlace(NamedTuple):
    """Where a device's part of a training batch stands; the devices share each batch equally.

    Attributes:
        before: Images of this epoch in earlier batches, of all devices.
        rank: Of the device.
        world_size: Number of devices.
    """

    before: int = 0
    rank: int = 0
    world_size: int = 1

    def share(self, count: int) -> int:
        """How many of `count` images of the batch are this device's; all shares make `count`."""
        return count * (self.rank + 1) // self.world_size - count * self.rank // self.world_size


@dataclass(frozen=True)
class View:
    """What a training stage wants to read.

    Attributes:
        role: Which images.
        augmentation: Applied on the device, with parameters of its own for every image.
        views: 0 gives one (augmented) `image` per row; n > 0 gives `views`, n independent
            augmentations, and leaves `image` as stored.
        batch_size: Images per step on all devices together; of a reading, images per batch.
        drop_last: Leave out an incomplete last batch.
        labels: Whether batches carry the labels of the data as `label`.
        subset: Only these rows of the role; `index` in a batch still counts those of the role.

    Raises:
        ConfigError: If a number is out of its range.
    """

    role: Role = "train"
    augmentation: AugmentationName = "none"
    views: int = 0
    batch_size: int = 128
    drop_last: bool = False
    labels: bool = False
    subset: Subset | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_not_negative("view.views", self.views)
        check_least("view.batch_size", self.batch_size, 1)


@dataclass(frozen=True, eq=False)
class Findings:
    """What a defence says of each of the N samples of a labelled training set.

    Attributes:
        score: (N,), float32; higher is more suspicious.
        flagged: (N,), bool: held to be poisoned; None where the method has scored and not judged.
        proposed: (N,), int64: the label that the defence would give; -1 where it has none.
        further: More scores, by name, as `score`.
        rounds: (R, N), bool: what would be flagged before and after each round of a method that
            works in rounds, by the method's rule for rounds; the first is the network as it was
            trained.
        round_epochs: (R,), int64: the epochs, from 0, at whose ends those were taken.
    """

    score: Tensor
    flagged: Tensor | None
    proposed: Tensor
    further: TensorDict
    rounds: Tensor
    round_epochs: Tensor


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The samples of the train role, for reports about them after training.

    Attributes:
        labels: (N,), as the data shows them.
        files: Where each sample came from; empty when it came from an archive.
        poisoned: (N,), bool; None where nobody knows.
        covers: (N,), bool: triggered samples that keep their label; None where nobody knows.
        classes: Names of the classes in the order of the labels; empty where they have none.
    """

    labels: Tensor
    files: tuple[str, ...]
    poisoned: Tensor | None
    covers: Tensor | None
    classes: tuple[str, ...] = ()


@runtime_checkable
class KnowsTruth(Protocol):
    """What reports about the samples of a training set ask for."""

    def training_set(self) -> TrainingSet:
        """Labels, files and, where it is known, the truth."""

    def training_images(self, rows: Tensor) -> Tensor:
        """The samples `rows` (M,) as they are trained on, (M, 3, H, W), uint8."""


@runtime_checkable
class ViewableData(Protocol):
    """All that a method knows about the data: it can ask for another view, or read one through."""

    view: View

    def set_view(self, view: View) -> None:
        """Makes `train_dataloader` serve `view` from its next call on."""

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled batches of the present view."""

    def num_batches(self, view: View) -> int:
        """Batches per epoch of `train_dataloader` under `view`, before any limit.

        The present view stays.
        """

    def num_rows(self, view: View) -> int:
        """Rows of `view`, on all devices together."""

    def reading_dataloader(self, view: View, *, shared: bool = False) -> DataLoader[dict[str, Any]]:
        """All rows of `view` in stored order, un-augmented.

        The whole of them on every rank or, `shared`, whole batches by turns among the ranks.
        """

    def device_batch(self, batch: dict[str, Any], device: torch.device) -> Batch:
        """A batch of `reading_dataloader` on `device`, its images as floats in [0, 1]."""


@runtime_checkable
class DescribesItself(Protocol):
    """What the run record asks a data module for."""

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts: name, roles with sizes, split seed, attack and plan hash."""

    def save_artifacts(self, folder: Path) -> None:
        """Writes the poison plan and the trigger, where there are any."""


@runtime_checkable
class HasIdentity(Protocol):
    """What exact resume asks a data module for."""

    def identity(self) -> dict[str, str]:
        """What tells the data of a fit from other data, by names that the user knows."""


@runtime_checkable
class ResumableLoader(Protocol):
    """A training loader that can begin an epoch after some of its batches."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def start_at(self, step: int) -> None:
        """Makes the next epoch begin at batch `step`."""
