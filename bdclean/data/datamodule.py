"""The data module: roles, hidden labels, poisoned rows and evaluation sets.

Labels leave this room only where a role may show them, and nothing above it can reach
back in; that is how the threat model of a label-free method is kept.
"""

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from bdclean.attacks import Attack, PoisonPlan, Trigger
from bdclean.data.images import ChosenRows, ImageSet, Overlay, RoleImages, labels_of
from bdclean.data.loading import TrainLoader, evaluation_loader, scan_loader, to_float
from bdclean.data.poisoning import (
    BatchPoisoner,
    PoisonAugmenter,
    evaluation_sets,
    make_batch_poisoner,
    poisoned_rows,
    require_fixed_rows,
)
from bdclean.data.record import attack_facts, training_set
from bdclean.data.sources import read_flat_folder
from bdclean.data.splits import RoleRows, Splits, draw_roles
from bdclean.data.views import ViewMaker
from bdclean.errors import ConfigError, DataError
from bdclean.functional.seeds import derive_seed
from bdclean.types import Batch, Role, TrainingSet, View

Labels = Literal["hidden", "visible"]


class ImageDataModule(LightningDataModule, ABC):
    """Images in memory, served by role.

    Subclasses set the class attributes (or set them before calling `super().__init__`) and
    implement the two readers.

    Args:
        attack: Poisons the `train` role and makes the triggered test set; None for clean data.
        splits: Sizes of the roles and the seed of their draw.
        defense_root: A folder of images, at any depth and without labels, that replaces the
            defender's images: out-of-distribution data, or a user's own photos.
        defense_labels: `visible` lets a labelled baseline see the labels of the defence role.
        view: What training reads when the module asks for nothing else.
        validate_in_fit: Evaluate on the `val` role after each epoch of a fit as well.
        eval_batch_size: Images per step and device in evaluation.
        shuffle_seed: Seed of order and augmentation; None takes the global seed.

    Attributes:
        name: Of the data set.
        num_classes: K.
        input_size: Side of the square images in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        allow_flip: False where a mirrored image may belong to another class. Augmentations then
            run without horizontal flips, whatever a method asks for.
        cache: Keep decoded image files in the user's cache, memory-mapped.
    """

    name: str
    num_classes: int
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    allow_flip: bool = True
    cache: bool = True

    def __init__(
        self,
        attack: Attack | None = None,
        splits: Splits = Splits(),  # noqa: B008  (frozen)
        defense_root: str | None = None,
        defense_labels: Labels = "hidden",
        view: View = View("train", augmentation="weak", labels=True),  # noqa: B008  (frozen)
        validate_in_fit: bool = False,
        eval_batch_size: int = 500,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.attack, self.splits, self.view = attack, splits, view
        self.defense_root = None if defense_root is None else str(Path(defense_root).expanduser())
        self.defense_labels, self.validate_in_fit = defense_labels, validate_in_fit
        self.eval_batch_size, self.shuffle_seed = eval_batch_size, shuffle_seed
        if eval_batch_size < 1:
            raise ConfigError(f"data.init_args.eval_batch_size={eval_batch_size}: give 1 or more.")

    @abstractmethod
    def read_train(self) -> ImageSet:
        """Reads the training images with their labels."""

    @abstractmethod
    def read_test(self) -> ImageSet:
        """Reads the test images with their labels."""

    @property
    def has_base(self) -> bool:
        """Whether there are training images at all, and not only the defender's folder."""
        return True

    def prepare_data(self) -> None:
        """Decodes the defender's folder once; on one process of a node."""
        with suppress(DataError):  # told where the images are needed, which may be nowhere
            _ = self.defense_set if self.defense_root is not None and self.cache else None

    # ------------------------------------------------------------------ sets, read once

    @cached_property
    def base(self) -> ImageSet:
        """All training images, as stored: clean."""
        return self.read_train()

    @cached_property
    def test_set(self) -> ImageSet:
        """All test images, as stored: clean."""
        return self.read_test()

    @cached_property
    def base_labels(self) -> Tensor:
        """(N,) true labels of `base`."""
        return labels_of(self.base)

    @cached_property
    def rows(self) -> RoleRows:
        """Which rows of `base` each role reads."""
        return draw_roles(self.base_labels, self.num_classes, self.splits)

    @cached_property
    def plan(self) -> PoisonPlan | None:
        """What the attack does to the `train` role; None without attack, or where it is empty."""
        if self.attack is None or not self.has_base or not len(self.rows.train):
            return None
        return self.attack.plan(self.base_labels[self.rows.train], self.num_classes)

    @cached_property
    def trigger(self) -> Trigger | None:
        """The trigger at the size of the images."""
        return None if self.attack is None else self.attack.make_trigger(self.input_size)

    @cached_property
    def batch_poisoner(self) -> BatchPoisoner | PoisonAugmenter | None:
        """Changes training batches, when the attack asks for it."""
        if self.attack is None or self.plan is None or self.trigger is None:
            return None
        return make_batch_poisoner(
            self.attack, self.plan, self.trigger, self.num_classes, flip=self.allow_flip
        )

    @cached_property
    def defense_set(self) -> ImageSet:
        """The images behind the defence role."""
        if self.defense_root is None:
            return self.base
        return read_flat_folder(Path(self.defense_root), self.input_size, cache=self.cache)

    def role_images(self, role: Role, *, labels: bool) -> RoleImages:
        """The rows of a role.

        Raises:
            ConfigError: If the role is empty, or may not show its labels.
        """
        if labels and role == "defense" and not self._defense_labels_shown:
            raise ConfigError(
                "This method asks for labels of the defence images, which are hidden. Use a "
                "label-free method, or set data.init_args.defense_labels to visible (a folder "
                "given as data.init_args.defense_root has none)."
            )
        if role == "train":
            images = self._train_images(labels)
        elif role == "defense" and self.defense_root is not None:
            everything = torch.arange(len(self.defense_set))
            chosen = everything if not self.splits.defense else self._sample_defense(everything)
            images = RoleImages(self.defense_set.images, chosen)
        else:
            rows = getattr(self.rows, role)
            columns = {"label": self.base_labels[rows]} if labels else None
            images = RoleImages(self.base.images, rows, columns=columns)
        if not len(images):
            way_out = f"set data.init_args.splits.{role} to the number it should hold."
            if role == "train":
                way_out = "lower the numbers in data.init_args.splits, which hold all of them out."
            raise ConfigError(f"The role {role} has no images; {way_out}")
        return images

    @property
    def _defense_labels_shown(self) -> bool:
        return self.defense_labels == "visible" and self.defense_root is None

    def _sample_defense(self, rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("defense", self.splits.seed))
        order = torch.randperm(len(rows), generator=generator)[: self.splits.defense]
        return rows[order.sort().values]

    @cached_property
    def train_overlay(self) -> Overlay | None:
        """The poisoned rows of the train role, made once, on their stored uint8 values."""
        plan, trigger = self.plan, self.trigger
        if self.attack is None or plan is None or trigger is None:
            return None
        stored = self.base.images[self.rows.train[plan.touched_index]]
        return poisoned_rows(self.attack, plan, trigger, stored, self.num_classes)

    def _train_images(self, labels: bool) -> RoleImages:
        rows, plan = self.rows.train, self.plan
        seen = self.base_labels[rows] if plan is None else plan.labels_seen
        columns = {"label": seen} if labels else None
        return RoleImages(self.base.images, rows, self.train_overlay, columns)

    def _viewed(self, view: View) -> RoleImages | ChosenRows:
        images = self.role_images(view.role, labels=view.labels)
        if view.subset is None:
            return images
        if view.role == "train":
            require_fixed_rows(self.attack)
        return ChosenRows(images, view.subset)

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, so that a missing data set is found out at once."""
        if stage == "fit":
            _ = self.rows if self.defense_root is None else self.defense_set
            _ = self.plan, self.trigger  # wrong settings are told before files are written
        else:
            _ = (self.rows if stage == "validate" else self.test_set), self.trigger
        if self.trigger is not None:
            self.trigger.require_levels()

    def set_view(self, view: View) -> None:
        """Makes `train_dataloader` serve `view`, whose images are made at once, from now on."""
        self.view = view
        _ = self._viewed(view)  # a surrogate that is missing is told before files are written

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches of the present view."""
        view = self.view
        images = self._viewed(view)
        if view.drop_last and len(images) < view.batch_size * self._world_size:
            raise ConfigError(
                f"The role {view.role} has {len(images)} images, fewer than one batch of "
                f"{view.batch_size} on each of {self._world_size} devices; lower "
                "model.init_args.batch_size or give more images."
            )
        self.view_maker.warn_once(view)
        return TrainLoader(
            images,
            batch_size=view.batch_size,
            drop_last=view.drop_last,
            seed=self._seed,
            world_size=self._world_size,
            rank=self._rank,
        )

    @cached_property
    def view_maker(self) -> ViewMaker:
        """Augments training batches, without what the data set or the trigger cannot bear."""
        blur = self.attack is None or self.attack.survives_blur
        return ViewMaker(self.name, flip=self.allow_flip, blur=blur)

    def scan_dataloader(self, view: View, *, shared: bool = False) -> DataLoader[dict[str, Any]]:
        """All rows of `view` in stored order, un-augmented.

        The whole of them on every rank or, `shared`, whole batches by turns among the ranks.
        """
        share = {"world_size": self._world_size, "rank": self._rank} if shared else {}
        return scan_loader(self._viewed(view), batch_size=view.batch_size, **share)

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Held-out training images, `clean` and `triggered`.

        Raises:
            ConfigError: If validation is asked for and no images are set aside for it.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not (self.validate_in_fit and self.splits.val):
            return []
        if not self.splits.val:
            raise ConfigError(
                "There are no validation images; set data.init_args.splits.val to the number to "
                "hold out of the training set. Test images are never used instead."
            )
        rows = self.rows.val
        return self._evaluation_loaders(self.base.images[rows], self.base_labels[rows])

    def test_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Test images: `clean` and, when there is an attack, `triggered` and its `further_tests`.

        The triggered loader holds the images whose true class may count (`Attack.eligible`).
        """
        return self._evaluation_loaders(self.test_set.images, labels_of(self.test_set))

    def predict_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """The same sets as `test_dataloader`."""
        return self.test_dataloader()

    @property
    def further_tests(self) -> tuple[str, ...]:
        """Names of the evaluation sets after `clean` and `triggered`."""
        if self.attack is None or self.trigger is None:
            return ()
        none = torch.empty(0, 3, self.input_size, self.input_size, dtype=torch.uint8)
        labels = torch.empty(0, dtype=torch.int64)
        return tuple(self.attack.further_tests(none, labels, self.trigger))

    def _evaluation_loaders(
        self, images: Tensor, labels: Tensor
    ) -> list[DataLoader[dict[str, Any]]]:
        sets = [RoleImages(images, torch.arange(len(images)), columns={"label": labels})]
        if self.attack is not None and self.trigger is not None:
            sets += evaluation_sets(self.attack, self.trigger, images, labels, self.num_classes)
        size, world_size, rank = self.eval_batch_size, self._world_size, self._rank
        return [
            evaluation_loader(s, batch_size=size, world_size=world_size, rank=rank) for s in sets
        ]

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Batch:
        """Floats the images and, in training, augments them on the device."""
        draw, first = batch.pop("draw", None), batch.pop("first", 0)
        ready = to_float(batch)
        if draw is None:
            return ready
        generator = torch.Generator(ready["image"].device).manual_seed(draw)
        if self.batch_poisoner is not None and self.view.role == "train":
            self.batch_poisoner(ready, first, generator)
        made = self.view_maker(self.view, ready["image"], generator)
        if self.view.views:
            ready["views"] = made
        else:
            ready["image"] = made[0]
        return ready

    def device_batch(self, batch: dict[str, Any], device: torch.device) -> Batch:
        """A batch of `scan_dataloader` on `device`, as floats."""
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        return to_float(moved)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _seed(self) -> int:
        if self.shuffle_seed is not None:
            return self.shuffle_seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    # ------------------------------------------------------------------ the run record

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts of the data: sizes by role, seeds, attack and hashes."""
        facts: dict[str, Any] = {
            "name": self.name,
            "num_classes": self.num_classes,
            "input_size": self.input_size,
            "allow_flip": self.allow_flip,
            "sizes": {},
            "split_seed": self.splits.seed,
            "defense_source": self.splits.defense_source,
            "attack": None,
        }
        if self.has_base:
            roles = ("train", "defense", "probe", "val")
            facts["sizes"] = {role: len(getattr(self.rows, role)) for role in roles}
            facts["split_hash"] = self.rows.hash
        if self.defense_root is not None:
            facts["defense_source"] = "folder"
            facts["sizes"]["defense"] = len(self.role_images("defense", labels=False))
        if self.attack is not None:
            facts |= attack_facts(self.attack, self.plan)
        return facts

    def training_set(self) -> TrainingSet:
        """The samples of the train role; an attack of ours knows which of them it poisoned."""
        fixed = self.attack is not None and not self.attack.dynamic
        plan = self.plan if fixed else None
        return training_set(self.base, self.base_labels, self.rows.train, plan)

    def training_images(self, rows: Tensor) -> Tensor:
        """The samples `rows` (M,) as they are trained on, (M, 3, H, W), uint8."""
        return self.role_images("train", labels=False).__getitems__(rows)["image"]

    def save_artifacts(self, folder: Path) -> None:
        """Writes the poison plan and the trigger, where there are any."""
        if self.plan is not None and self.trigger is not None:
            self.plan.save(folder)
            self.trigger.save(folder / "trigger.safetensors")
