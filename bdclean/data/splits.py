"""Disjoint roles of a data set, drawn from a seed of their own."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdclean.checks import check_not_negative, check_seed
from bdclean.errors import ConfigError, counted
from bdclean.functional.seeds import derive_seed
from bdclean.types import Role

AnyRole = Role | Literal["val"]
"""The roles that a method may ask for, and that of validation."""


@dataclass(frozen=True)
class Splits:
    """How many training images each role receives.

    Attributes:
        defense: Clean unlabelled images of the defender.
        probe: Clean labelled images of the linear probe, the same number of every class.
        val: Held-out labelled images for `validate`, where settings may be compared.
        defense_source: `holdout` takes the defender's images out of the training set;
            `train` gives the clean versions of images that are also trained on.
        seed: Seed of the draw, independent of the training seed.
    """

    defense: int = 0
    probe: int = 0
    val: int = 0
    defense_source: Literal["holdout", "train"] = "holdout"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the counts."""
        check_not_negative("splits.defense", self.defense)
        check_not_negative("splits.probe", self.probe)
        check_not_negative("splits.val", self.val)
        check_seed("splits.seed", self.seed)


@dataclass(frozen=True)
class RoleRows:
    """Rows of the stored training images by role, each ascending, int64."""

    train: Tensor
    defense: Tensor
    probe: Tensor
    val: Tensor

    def of(self, role: AnyRole) -> Tensor:
        """The rows of a role."""
        return dict(self.items())[role]

    def items(self) -> Iterator[tuple[AnyRole, Tensor]]:
        """Yields each role with its rows."""
        yield from (("train", self.train), ("defense", self.defense))
        yield from (("probe", self.probe), ("val", self.val))

    @property
    def hash(self) -> str:
        """SHA-256 over all four index sets."""
        digest = hashlib.sha256()
        for _, rows in self.items():
            digest.update(len(rows).to_bytes(8, "little") + rows.numpy().tobytes())
        return digest.hexdigest()


def draw_roles(labels: Tensor, num_classes: int, splits: Splits) -> RoleRows:
    """Partitions the rows of a data set.

    Validation and probe rows are drawn first, so that they stay the same when only the
    number of defence images changes.

    Args:
        labels: (N,) true labels; used only to give the probe equally many of each class.
        num_classes: K.
        splits: The sizes and the seed.

    Returns:
        The rows. `val`, `probe` and `train` are disjoint; `defense` is disjoint from `val`
        and `probe`, and from `train` unless `defense_source` is `train`. `train` is empty where
        `probe` takes all rows.

    Raises:
        ConfigError: If the data set is too small for the sizes asked for.
    """
    asked = splits.defense + splits.probe + splits.val
    # Full-label evaluation of a backbone may take all images; nothing is trained on then.
    all_labelled = splits.probe == asked == len(labels)
    if asked >= len(labels) and not all_labelled:
        raise ConfigError(
            f"splits: it asks for {asked} images (defense + probe + val) of {len(labels)}, which "
            "leaves none to train on; ask for fewer."
        )
    generator = torch.Generator().manual_seed(derive_seed("roles", splits.seed))
    order = torch.randperm(len(labels), generator=generator)
    val, order = order[: splits.val], order[splits.val :]
    probe = _balanced(order, labels, num_classes, splits.probe)
    order = order[~torch.isin(order, probe)]
    defense = order[: splits.defense]
    train = order if splits.defense_source == "train" else order[splits.defense :]
    return RoleRows(*(rows.sort().values for rows in (train, defense, probe, val)))


def draw_from_folder(count: int, splits: Splits) -> Tensor:
    """Which of the `count` images of a defender's folder he holds: a sample, or all of them.

    Returns:
        Ascending rows: min(`count`, `splits.defense`) of them, all where that is 0.
    """
    if not splits.defense:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed("defense", splits.seed))
    return torch.randperm(count, generator=generator)[: splits.defense].sort().values


def _balanced(order: Tensor, labels: Tensor, num_classes: int, count: int) -> Tensor:
    """The first rows of `order` such that every class has count / K of them."""
    if count % num_classes:
        raise ConfigError(
            f"splits.probe={count}: it must be a multiple of the {num_classes} classes, because "
            "the probe set is balanced."
        )
    per_class = count // num_classes
    picks = []
    for k in range(num_classes):
        rows = order[labels[order] == k][:per_class]
        if len(rows) < per_class:
            raise ConfigError(
                f"splits.probe={count}: class {k} has only {counted(len(rows), 'image')} left for "
                f"its {per_class}; ask for fewer."
            )
        picks.append(rows)
    return torch.cat(picks)
