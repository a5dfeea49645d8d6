"""What an attack makes of images: training rows, evaluation sets, and batches."""

import copy
from typing import Any

import torch
from torch import Tensor

from bdclean.attacks import Attack, PoisonPlan, Trigger
from bdclean.attacks.checks import returned
from bdclean.data.adversarial_rows import adversarial_rows, surrogate_hash
from bdclean.data.augment import augment
from bdclean.data.images import ImageSet, Overlay, RoleImages
from bdclean.errors import AttackError, ConfigError
from bdclean.types import AugmentationName, Batch, BatchPlace


def named_for(attack: Attack | None, images: ImageSet) -> ImageSet:
    """The images, after the attack was told the names of their classes."""
    if attack is not None:
        attack.name_classes(images.classes)
    return images


def poisoned_rows(
    attack: Attack, plan: PoisonPlan, trigger: Trigger, images: Tensor, num_classes: int
) -> Overlay:
    """The rows that the plan touches, as they are trained on.

    Args:
        attack: Who made the plan and the trigger.
        plan: For the rows of one role.
        trigger: At the size of the images.
        images: The clean rows `plan.touched_index`, uint8, (P, 3, H, W).
        num_classes: K.
    """
    if attack.adversarial is not None:
        labels = plan.labels_true[plan.touched_index]
        images = adversarial_rows(attack.adversarial, images, labels, num_classes)
    rows = returned(attack, "poison_rows", attack.poison_rows(images, plan, trigger), Tensor)
    return Overlay(plan.touched_index, rows)


def attack_facts(attack: Attack | None, plan: PoisonPlan | None) -> dict[str, Any]:
    """The attack with its settings, what it did to the training set, and hashes; for JSON.

    `plan` is None where no image is left to train on.
    """
    if attack is None:
        return {"attack": None}
    facts: dict[str, Any] = {"attack": attack.describe(), "dynamic": attack.dynamic}
    if plan is not None:
        facts |= {
            "plan_hash": plan.hash,
            "num_poisoned": len(plan.poison_index),
            "num_covers": len(plan.cover_index),
            "num_label_changed": plan.num_label_changed,
        }
    if attack.adversarial is not None:
        facts["surrogate_hash"] = surrogate_hash(attack.adversarial)
    return facts


def evaluation_sets(
    attack: Attack | None,
    trigger: Trigger | None,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
) -> list[RoleImages]:
    """The clean images; with an attack those that count with its trigger, and its further tests.

    Clean images carry the attacker's `target` as well, for the floor of ASR; -1 where an image
    does not count.

    Args:
        attack: Whose rules apply.
        trigger: The attack's, at the size of the images.
        images: Clean images, uint8, (N, 3, H, W).
        labels: True labels, (N,).
        num_classes: K.

    Raises:
        AttackError: If the attack's further tests are not those that its class names.
    """
    clean = RoleImages(images, torch.arange(len(images)), columns={"label": labels})
    if attack is None or trigger is None:
        return [clean]
    counts = returned(attack, "eligible", attack.eligible(labels), Tensor)
    target = returned(attack, "wanted_label", attack.wanted_label(labels, num_classes), Tensor)
    clean.columns["target"] = target.where(counts, -1)
    rows, wanted = counts.nonzero().flatten(), target[counts]
    sets = [(rows, trigger.poison(images[rows]), wanted)]
    further = attack.further_tests(images, labels, trigger)
    returned(attack, "further_tests", further, dict)
    if tuple(further) != attack.further:
        raise AttackError(
            f"{type(attack).__name__}.further={attack.further}: further_tests gives "
            f"{tuple(further)}; both must have the same names in the same order."
        )
    sets += [(test.rows, test.images, test.wanted) for test in further.values()]
    return [clean] + [
        RoleImages(
            images,
            rows,
            Overlay(torch.arange(len(rows)), shown),
            columns={"label": labels[rows], "target": wanted},
        )
        for rows, shown, wanted in sets
    ]


def require_fixed_rows(attack: Attack | None) -> None:
    """Refuses to choose single training samples under an attack that poisons batches.

    Raises:
        ConfigError: If the attack is dynamic.
    """
    if attack is not None and attack.dynamic:
        raise ConfigError(
            f"attack={type(attack).__name__}: it poisons batches, so that no sample is the "
            "poisoned one and there is nothing to find; take its static form (WaNet: mode "
            "static; InputAware: trigger, the file of a learned one)."
        )


class BatchPoisoner:
    """Poisons training batches for a dynamic attack.

    Args:
        attack: A dynamic one.
        trigger: Stays where it is; batches meet a copy on their device.
        num_classes: K.
    """

    def __init__(self, attack: Attack, trigger: Trigger, num_classes: int) -> None:
        self.attack, self.num_classes = attack, num_classes
        self._trigger = copy.deepcopy(trigger)

    def __call__(self, batch: Batch, place: BatchPlace, generator: torch.Generator) -> None:
        """Changes images and labels of a batch of clean images, before its augmentation.

        Args:
            batch: Changed in place; its tensors are not.
            place: See `Attack.poison_batch`.
            generator: On the device of the batch.
        """
        images = batch["image"]
        labels = batch["label"] if "label" in batch else torch.zeros_like(batch["index"])
        images, labels = self.attack.poison_batch(
            images, labels, self._trigger.to(images.device), self.num_classes, place, generator
        )
        batch["image"] = images.contiguous(memory_format=torch.channels_last)
        if "label" in batch:
            batch["label"] = labels


class PoisonAugmenter:
    """Augments the poisoned rows of training batches, and no other.

    Args:
        name: See `augment`, as for `flip`.
        plan: Of the train role, whose rows `index` counts.
        flip: Whether images may be mirrored.
    """

    def __init__(self, name: AugmentationName, plan: PoisonPlan, *, flip: bool) -> None:
        self._name, self._flip = name, flip
        self._poisoned = torch.zeros(plan.num_samples, dtype=torch.bool)
        self._poisoned[plan.poison_index] = True

    def __call__(self, batch: Batch, place: BatchPlace, generator: torch.Generator) -> None:
        """Changes the images of a batch, before its augmentation.

        Args:
            batch: Changed in place; its tensors are not.
            place: Not read.
            generator: On the device of the batch.
        """
        images = batch["image"]
        self._poisoned = self._poisoned.to(images.device)
        chosen = self._poisoned[batch["index"]][:, None, None, None]
        moved = augment(self._name, images, generator, flip=self._flip)
        batch["image"] = torch.where(chosen, moved, images)


def make_batch_poisoner(
    attack: Attack, plan: PoisonPlan, trigger: Trigger, num_classes: int, *, flip: bool
) -> BatchPoisoner | PoisonAugmenter | None:
    """What the attack does to training batches; None where it only changes stored rows.

    Args:
        attack: Who made the plan and the trigger.
        plan: Of the train role.
        trigger: At the size of the images.
        num_classes: K.
        flip: Whether images may be mirrored.
    """
    if attack.dynamic:
        return BatchPoisoner(attack, trigger, num_classes)
    if attack.poison_augmentation != "none":
        return PoisonAugmenter(attack.poison_augmentation, plan, flip=flip)
    return None
