"""The training images by role, those of the train role as an attack leaves them. No Lightning."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from bdclean.attacks import Attack, PoisonPlan, Trigger
from bdclean.attacks.checks import returned
from bdclean.data.images import ImageSet, Overlay, RoleImages, labels_of
from bdclean.data.poisoning import (
    BatchPoisoner,
    PoisonAugmenter,
    attack_facts,
    make_batch_poisoner,
    poisoned_rows,
)
from bdclean.data.splits import AnyRole, RoleRows, Splits, draw_roles
from bdclean.errors import ConfigError
from bdclean.types import TrainingSet


@dataclass(frozen=True, eq=False)
class PoisonedSet:
    """The training images of a data set, by role.

    Attributes:
        stored: All of them, clean, with their true labels.
        rows: Which of them each role reads.
        num_classes: K.
        attack: Who poisons the train role; None for clean data.
        trigger: The attack's, at the size of the images.
        plan: What the attack does to the rows of the train role; None where there is no attack,
            or no image left to train on.
    """

    stored: ImageSet
    rows: RoleRows
    num_classes: int
    attack: Attack | None = None
    trigger: Trigger | None = None
    plan: PoisonPlan | None = None

    @classmethod
    def draw(
        cls,
        stored: ImageSet,
        num_classes: int,
        splits: Splits,
        attack: Attack | None = None,
        trigger: Trigger | None = None,
    ) -> Self:
        """Draws the roles, and the rows that the attack poisons.

        Raises:
            ConfigError: If there are too few images for the splits, or none has a label.
            AttackError: If the attack does not fit the labels.
        """
        labels = labels_of(stored)
        rows = draw_roles(labels, num_classes, splits)
        plan = None
        if attack is not None and len(rows.train):
            returned(attack, "make_trigger", trigger, Trigger)
            plan = attack.plan(labels[rows.train], num_classes)
            returned(attack, "plan", plan, PoisonPlan)
        return cls(stored, rows, num_classes, attack, trigger, plan)

    @cached_property
    def overlay(self) -> Overlay | None:
        """The poisoned rows of the train role, made once, on their stored uint8 values."""
        if self.attack is None or self.plan is None or self.trigger is None:
            return None
        images = self.stored.images[self.rows.train[self.plan.touched_index]]
        return poisoned_rows(self.attack, self.plan, self.trigger, images, self.num_classes)

    def role(self, role: AnyRole, *, labels: bool = False) -> RoleImages:
        """The images of a role: poisoned in the train role, clean in all others.

        Args:
            role: Which.
            labels: Hand out `label` as well: of the train role as its plan shows them, else true.

        Raises:
            ConfigError: If it has no images.
            AttackError: If poisoned images cannot be made.
        """
        rows, overlay = self.rows.of(role), None
        if not len(rows):
            raise _empty(role)
        shown = labels_of(self.stored)[rows]
        if role == "train":
            overlay = self.overlay
            shown = shown if self.plan is None else self.plan.labels_seen
        return RoleImages(self.stored.images, rows, overlay, {"label": shown} if labels else None)

    def batch_poisoner(self, *, flip: bool) -> BatchPoisoner | PoisonAugmenter | None:
        """What the attack does to training batches; None where it only changes stored rows.

        Args:
            flip: Whether images may be mirrored.
        """
        if self.attack is None or self.plan is None or self.trigger is None:
            return None
        return make_batch_poisoner(
            self.attack, self.plan, self.trigger, self.num_classes, flip=flip
        )

    def truth(self) -> TrainingSet:
        """The samples of the train role, and which of them are poisoned.

        Nobody knows the latter where no attack of ours is at work, which does not mean that the
        images are clean, or where one poisons every batch again.
        """
        rows, plan, poisoned, covers = self.rows.train, self.plan, None, None
        if self.attack is not None and plan is not None and not self.attack.dynamic:
            poisoned = torch.zeros(len(rows), dtype=torch.bool)
            covers = poisoned.clone()
            poisoned[plan.poison_index] = True
            covers[plan.cover_index] = True
        files = self.stored.files
        return TrainingSet(
            labels=labels_of(self.stored)[rows] if plan is None else plan.labels_seen,
            files=tuple(files[row] for row in rows.tolist()) if files else (),
            poisoned=poisoned,
            covers=covers,
            classes=self.stored.classes,
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts: sizes by role, the attack, what it did, and hashes."""
        facts: dict[str, Any] = {
            "sizes": {role: len(rows) for role, rows in self.rows.items()},
            "split_hash": self.rows.hash,
        }
        return facts | attack_facts(self.attack, self.plan)

    def save(self, folder: Path) -> None:
        """Writes the poison plan and the trigger, where there are any."""
        if self.plan is not None and self.trigger is not None:
            self.plan.save(folder)
            self.trigger.save(folder / "trigger.safetensors")


def _empty(role: AnyRole) -> ConfigError:
    if role == "train":
        return ConfigError(
            "splits: they hold out all images, so that the role train has no images; lower the "
            "numbers."
        )
    return ConfigError(
        f"splits.{role}=0: the role {role} has no images; give the number that it should hold."
    )
