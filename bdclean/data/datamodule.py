"""The data module: it serves images by role, and labels only where a role may show them.

Nothing above this room can reach back into it; that is how the threat model of a label-free
method is kept.
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from bdclean.attacks import Attack, PoisonPlan, Trigger
from bdclean.checks import check_least, check_seed
from bdclean.data.decoding import OnError, Reading
from bdclean.data.identity import identities
from bdclean.data.images import ChosenRows, ImageSet, RoleImages, Rows, labels_of, skipped_files
from bdclean.data.loading import TrainLoader, evaluation_loader, reading_loader, to_float
from bdclean.data.poisoned_set import PoisonedSet
from bdclean.data.poisoning import (
    BatchPoisoner,
    PoisonAugmenter,
    attack_facts,
    evaluation_sets,
    named_for,
    require_fixed_rows,
)
from bdclean.data.sources import read_flat_folder
from bdclean.data.splits import RoleRows, Splits, draw_from_folder
from bdclean.data.views import Labels, ViewMaker, require_classes, require_shown
from bdclean.errors import ConfigError, DataError, counted
from bdclean.functional.seeds import global_seed
from bdclean.types import Batch, BatchPlace, ImageFacts, Role, TrainingSet, View

Loader = DataLoader[dict[str, Any]]


class ImageDataModule(LightningDataModule, ABC):
    """Images in memory, served by role.

    Subclasses set the class attributes (or set them before calling `super().__init__`) and
    implement the two readers. A constructor takes its own arguments and forwards `**kwargs: Any`
    to this one, whose arguments the command line then knows as well.

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
        exif_orientation: Turn photos as viewers do, by the orientation that cameras note in them.
        on_error: What to do with a broken image file: `raise` an error, or `skip` it.

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
        exif_orientation: bool = True,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()
        self.attack, self.splits, self.view = attack, splits, view
        self.defense_root = None if defense_root is None else str(Path(defense_root).expanduser())
        self.defense_labels, self.validate_in_fit = defense_labels, validate_in_fit
        self.eval_batch_size = check_least("eval_batch_size", eval_batch_size, 1)
        self.shuffle_seed = shuffle_seed and check_seed("shuffle_seed", shuffle_seed)
        self.exif_orientation, self.on_error = exif_orientation, on_error

    @abstractmethod
    def read_train(self) -> ImageSet:
        """Reads the training images with their labels."""

    @abstractmethod
    def read_test(self) -> ImageSet:
        """Reads the test images with their labels."""

    @property
    def has_training_images(self) -> bool:
        """Whether there are training images at all, and not only the defender's folder."""
        return True

    @property
    def has_test_images(self) -> bool:
        """Whether there is a test set."""
        return True

    def prepare_data(self) -> None:
        """Decodes the defender's folder once; on one process of a node."""
        with suppress(DataError):  # reported where the images are needed, which may be nowhere
            _ = self.defense_set if self.defense_root is not None and self.cache else None

    # ------------------------------------------------------------------ sets, read once

    @property
    def reading(self) -> Reading:
        """How image files are read."""
        return Reading(self.cache, self.exif_orientation, self.on_error)

    @cached_property
    def stored(self) -> ImageSet:
        """All training images, clean."""
        return named_for(self.attack, self.read_train())

    @cached_property
    def test_set(self) -> ImageSet:
        """All test images, clean."""
        return named_for(self.attack, self.read_test())

    @cached_property
    def defense_set(self) -> ImageSet:
        """The images behind the defence role."""
        if self.defense_root is None:
            return self.stored
        return read_flat_folder(Path(self.defense_root), self.input_size, reading=self.reading)

    @cached_property
    def _folder_rows(self) -> Tensor:
        return draw_from_folder(len(self.defense_set), self.splits)

    @cached_property
    def trigger(self) -> Trigger | None:
        """The trigger at the size of the images."""
        size = (self.input_size, self.input_size)
        return None if self.attack is None else self.attack.make_trigger(size)

    @cached_property
    def poisoned_set(self) -> PoisonedSet:
        """The training images by role, and what the attack does to them."""
        return PoisonedSet.draw(
            self.stored, self.num_classes, self.splits, self.attack, self.trigger
        )

    @property
    def rows(self) -> RoleRows:
        """Which rows of `stored` each role reads."""
        return self.poisoned_set.rows

    @property
    def plan(self) -> PoisonPlan | None:
        """What the attack does to the `train` role; None without attack, or where it is empty."""
        return self.poisoned_set.plan if self.has_training_images else None

    @cached_property
    def batch_poisoner(self) -> BatchPoisoner | PoisonAugmenter | None:
        """Changes training batches, when the attack asks for it."""
        return self.poisoned_set.batch_poisoner(flip=self.allow_flip)

    @cached_property
    def view_maker(self) -> ViewMaker:
        """Augments training batches, without what the data set or the trigger cannot bear."""
        blur = self.attack is None or self.attack.survives_blur
        return ViewMaker(self.name, flip=self.allow_flip, blur=blur)

    # ------------------------------------------------------------------ roles and views

    def role_images(self, role: Role, *, labels: bool) -> RoleImages:
        """The rows of a role.

        Raises:
            ConfigError: If the role is empty, or may not show its labels.
        """
        if labels and self.has_training_images:
            require_classes(self.num_classes)
        if labels and role == "defense":
            require_shown(self.defense_root, self.defense_labels)
        if role == "defense" and self.defense_root is not None:
            return RoleImages(self.defense_set.images, self._folder_rows)
        return self.poisoned_set.role(role, labels=labels)

    def _viewed(self, view: View) -> Rows:
        """What `view` reads. The data's labels stay where they are if the method brings its own."""
        subset = view.subset
        own = subset is not None and subset.labels is not None
        images = self.role_images(view.role, labels=view.labels and not own)
        if subset is None:
            return images
        if view.role == "train":
            require_fixed_rows(self.attack)
        return ChosenRows(images, subset)

    def set_view(self, view: View) -> None:
        """Makes `train_dataloader` serve `view`, whose images are made at once, from now on."""
        self.view = view
        _ = self._viewed(view)  # fail here, before files are written, if a surrogate is missing

    def num_batches(self, view: View) -> int:
        """Batches per epoch of `train_dataloader` under `view`, whose images are made.

        Raises:
            ConfigError: As `set_view` and `train_dataloader`.
        """
        return len(self._train_loader(view))

    def num_rows(self, view: View) -> int:
        """Rows of `view`, whose images are made, on all devices together.

        Raises:
            ConfigError: As `set_view`.
        """
        return len(self._viewed(view))

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, so that wrong settings and missing data fail at once."""
        if stage == "fit" and self.defense_root is not None:
            _ = self.defense_set
        if stage == "validate" or (stage == "fit" and self.has_training_images):
            _ = self.poisoned_set
        if stage in ("test", "predict"):
            _ = self.test_set
        self._require_stamper()
        if self.trigger is not None:
            self.trigger.require_levels()

    def _require_stamper(self) -> None:
        if self.attack is not None:
            self.attack.require_stamper(self.trainer and self.trainer.lightning_module)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches of the present view."""
        loader = self._train_loader(self.view)
        self.view_maker.warn_once(self.view)
        return loader

    def _train_loader(self, view: View) -> TrainLoader:
        rows, world_size = self._viewed(view), self._world_size
        if view.drop_last and len(rows) < view.batch_size:
            raise ConfigError(
                f"batch_size={view.batch_size}: the role {view.role} has "
                f"{counted(len(rows), 'image')}, fewer than one batch; lower it, or give more "
                "images."
            )
        sizes = {"batch_size": view.batch_size, "world_size": world_size, "rank": self._rank}
        return TrainLoader(rows, drop_last=view.drop_last, seed=self._seed, **sizes)

    def reading_dataloader(self, view: View, *, shared: bool = False) -> Loader:
        """All rows of `view` in stored order, un-augmented.

        The whole of them on every rank or, `shared`, whole batches by turns among the ranks.
        """
        share = {"world_size": self._world_size, "rank": self._rank} if shared else {}
        return reading_loader(self._viewed(view), batch_size=view.batch_size, **share)

    def val_dataloader(self) -> list[Loader]:
        """Held-out training images, `clean` and `triggered`.

        Raises:
            ConfigError: If validation is asked for and no images are set aside for it.
        """
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not (self.validate_in_fit and self.splits.val):
            return []
        if not self.splits.val:
            raise ConfigError(
                "splits.val=0: there are no validation images; give the number to hold out of the "
                "training set. Test images are never used instead."
            )
        held_out = self.poisoned_set.role("val", labels=True).everything()
        return self._evaluation_loaders(held_out["image"], held_out["label"])

    def test_dataloader(self) -> list[Loader]:
        """Test images: `clean` and, when there is an attack, `triggered` and its `further`.

        The triggered loader holds the images whose true class may count (`Attack.eligible`).
        """
        return self._evaluation_loaders(self.test_set.images, labels_of(self.test_set))

    def predict_dataloader(self) -> list[Loader]:
        """The same sets as `test_dataloader`."""
        return self.test_dataloader()

    @property
    def facts(self) -> ImageFacts:
        """What modules have to know of the data."""
        return ImageFacts(self.num_classes, self.input_size, self.mean, self.std)

    @property
    def further_tests(self) -> tuple[str, ...]:
        """Names of the evaluation sets after `clean` and `triggered`."""
        return () if self.attack is None else self.attack.further

    def _evaluation_loaders(self, images: Tensor, labels: Tensor) -> list[Loader]:
        self._require_stamper()
        sets = evaluation_sets(self.attack, self.trigger, images, labels, self.num_classes)
        size, world_size, rank = self.eval_batch_size, self._world_size, self._rank
        return [
            evaluation_loader(s, batch_size=size, world_size=world_size, rank=rank) for s in sets
        ]

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Batch:
        """Floats the images and, in training, augments them on the device."""
        draw, place = batch.pop("draw", None), batch.pop("place", BatchPlace())
        ready = to_float(batch)
        if draw is None:
            return ready
        generator = torch.Generator(ready["image"].device).manual_seed(draw)
        if self.view.role == "train" and self.batch_poisoner is not None:
            self.batch_poisoner(ready, place, generator)
        made = self.view_maker(self.view, ready["image"], generator)
        if self.view.views:
            ready["views"] = made
        else:
            ready["image"] = made[0]
        return ready

    def device_batch(self, batch: dict[str, Any], device: torch.device) -> Batch:
        """A batch of `reading_dataloader` on `device`, as floats."""
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
        return global_seed() or 0

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
        }
        if self.has_training_images:
            facts |= self.poisoned_set.describe()
        else:
            facts |= attack_facts(self.attack, None)
        if self.defense_root is not None:
            facts["defense_source"] = "folder"
            facts["sizes"]["defense"] = len(self._folder_rows)
        return facts | skipped_files(self.__dict__)

    def identity(self) -> dict[str, str]:
        """What tells the images of a fit from others, and what an attack does to them."""
        defence = None if self.defense_root is None else self.defense_set
        return identities(self.stored if self.has_training_images else None, defence, self.plan)

    def training_set(self) -> TrainingSet:
        """The samples of the train role; an attack of ours knows which of them it poisoned."""
        return self.poisoned_set.truth()

    def training_images(self, rows: Tensor) -> Tensor:
        """The samples `rows` (M,) as they are trained on, (M, 3, H, W), uint8."""
        return self.role_images("train", labels=False).shown(rows)

    def save_artifacts(self, folder: Path) -> None:
        """Writes the poison plan and the trigger, where there are any."""
        if self.has_training_images:
            self.poisoned_set.save(folder)
