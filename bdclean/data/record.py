"""What a data module says of itself after training."""

from typing import Any

import torch
from torch import Tensor

from bdclean.attacks import Attack, PoisonPlan
from bdclean.data.images import ImageSet
from bdclean.data.perturbed import surrogate_hash
from bdclean.types import TrainingSet


def attack_facts(attack: Attack, plan: PoisonPlan | None) -> dict[str, Any]:
    """The attack with its settings, what it did to the training set, and hashes; for JSON.

    `plan` is None where no image is left to train on.
    """
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


def training_set(
    images: ImageSet, labels: Tensor, rows: Tensor, plan: PoisonPlan | None
) -> TrainingSet:
    """The samples of the train role.

    Args:
        images: Behind all roles.
        labels: True labels of all images, (M,).
        rows: Those of the role, (N,).
        plan: What an attack of ours did to them; None where no such attack is at work, which
            does not mean that the images are clean, or one that poisons every batch anew.
    """
    poisoned = covers = None
    if plan is not None:
        poisoned = torch.zeros(len(rows), dtype=torch.bool)
        covers = poisoned.clone()
        poisoned[plan.poison_index] = True
        covers[plan.cover_index] = True
    return TrainingSet(
        labels=labels[rows] if plan is None else plan.labels_seen,
        files=tuple(images.files[row] for row in rows.tolist()) if images.files else (),
        poisoned=poisoned,
        covers=covers,
        classes=images.classes,
    )
