"""Which rows of a training set an attack touches, and the labels a victim sees."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdclean.attacks.checks import LabelRule, RateBase
from bdclean.errors import AttackError, in_words
from bdclean.files import write_text
from bdclean.weights import format as weights_format

_TENSORS = ("poison_index", "cover_index", "labels_seen", "labels_true")
_SETTINGS = ("rate", "rate_base", "num_samples", "attack", "target", "label_rule", "seed")


@dataclass(frozen=True, eq=False)
class PoisonPlan:
    """The outcome of an attack's selection, a function of its own seed and the labels.

    Poison, cover and clean rows are disjoint and make up the whole set.

    Attributes:
        poison_index: Rows that get the trigger and the attack's label, sorted, int64.
        cover_index: Rows that get the trigger and keep their label, sorted, int64.
        labels_seen: (N,) int64, the labels in the poisoned set.
        labels_true: (N,) int64, the labels before the attack.
        rate: The rate that was asked for, in (0, 1].
        rate_base: What `rate` is a share of.
        num_samples: N.
        attack: Name of the attack's class.
        target: Target class; None for all-to-all.
        label_rule: What happened to the labels of the poisoned rows.
        seed: The attack's seed.
    """

    poison_index: Tensor
    cover_index: Tensor
    labels_seen: Tensor
    labels_true: Tensor
    rate: float
    rate_base: RateBase
    num_samples: int
    attack: str
    target: int | None
    label_rule: LabelRule
    seed: int

    def __post_init__(self) -> None:
        """Checks shapes, types and the partition."""
        n = self.num_samples
        if any(getattr(self, name).dtype != torch.int64 for name in _TENSORS):
            raise AttackError("poison plan: indices and labels must be int64.")
        if self.labels_seen.shape != (n,) or self.labels_true.shape != (n,):
            raise AttackError(f"poison plan: there must be {n} labels, one per row.")
        touched = torch.cat([self.poison_index, self.cover_index])
        if touched.numel() and (touched.min() < 0 or touched.max() >= n):
            raise AttackError(f"poison plan: indices must lie in [0, {n}).")
        if (touched.bincount() > 1).any():
            raise AttackError("poison plan: poison and cover rows must be distinct.")
        if any((index.diff() <= 0).any() for index in (self.poison_index, self.cover_index)):
            raise AttackError("poison plan: indices must be sorted.")

    @property
    def touched_index(self) -> Tensor:
        """Rows that the attack changes, poison and covers, sorted, int64."""
        return torch.cat([self.poison_index, self.cover_index]).sort().values

    @property
    def clean_index(self) -> Tensor:
        """Rows that stay as they are, sorted, int64."""
        untouched = torch.ones(self.num_samples, dtype=torch.bool)
        untouched[self.touched_index] = False
        return untouched.nonzero().flatten()

    @property
    def num_label_changed(self) -> int:
        """Rows whose label differs from the true one (poisons of the target class do not)."""
        return int((self.labels_seen != self.labels_true).sum())

    @property
    def rate_of_dataset(self) -> float:
        """Poisoned rows over all rows."""
        return len(self.poison_index) / self.num_samples

    @property
    def rate_of_target_class(self) -> float | None:
        """Poisoned rows over the size of the target class; None where there is no such class.

        Above 1 for a dirty-label attack that poisons more rows than the class has.
        """
        size = 0 if self.target is None else int((self.labels_true == self.target).sum())
        return len(self.poison_index) / size if size else None

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over indices, labels and settings; equal means the same poisoning."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name in _TENSORS:
            tensor = getattr(self, name)
            digest.update(f"{name} {len(tensor)}".encode())
            digest.update(tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes `plan.safetensors` (indices and labels) and `plan.json` (settings, counts)."""
        folder = Path(folder)
        tensors = {name: getattr(self, name) for name in _TENSORS}
        weights_format.write(tensors, folder / "plan.safetensors", {})
        facts = {
            **self._settings(),
            "num_poison": len(self.poison_index),
            "num_cover": len(self.cover_index),
            "num_label_changed": self.num_label_changed,
            "rate_of_dataset": self.rate_of_dataset,
            "rate_of_target_class": self.rate_of_target_class,
            "hash": self.hash,
        }
        text = json.dumps(facts, indent=2) + "\n"
        write_text(folder / "plan.json", text)

    @classmethod
    def load(cls, folder: str | Path) -> "PoisonPlan":
        """Reads a saved plan.

        Raises:
            WeightsError: The tensor file is missing or unreadable.
            AttackError: The JSON file is, or the two do not belong together.
        """
        folder = Path(folder)
        tensors, _ = weights_format.read(folder / "plan.safetensors")
        path = folder / "plan.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            fields: dict[str, Any] = {name: facts[name] for name in _SETTINGS}
            fields |= {name: tensors[name] for name in _TENSORS}
            plan = cls(**fields)
        except Exception as error:  # damaged settings can end anywhere above
            raise AttackError(
                f"{path}: not a saved poison plan: {type(error).__name__}, {in_words(error)}."
            ) from error
        if plan.hash != facts.get("hash"):
            raise AttackError(f"{folder}: plan.json and plan.safetensors do not match.")
        return plan

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}
