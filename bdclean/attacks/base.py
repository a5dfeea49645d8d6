"""An attack: a trigger, a selection of training rows, and a rule for their labels."""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bdclean.attacks.assets import recorded
from bdclean.attacks.checks import (
    LabelRule,
    Quantize,
    RateBase,
    check_class,
    checked_labels,
    is_between,
    labelled,
    require,
    require_choice,
    require_class,
    require_integer,
    returned,
    warn_of_numbers,
)
from bdclean.attacks.parts import Adversarial, FurtherTest
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.errors import AttackError, counted
from bdclean.functional.seeds import derive_seed
from bdclean.types import AugmentationName, BatchPlace


class Attack(ABC):
    """Everything an attacker decides, apart from any data set.

    A subclass has `make_trigger`. Its constructor takes its own arguments, keeps each of them
    under its name, and forwards `**kwargs` to this one; it repeats an argument of this one only
    to give it another default.

    Where it differs from an attack that stamps one trigger on rows of any class, it overrides
    `pool` (which rows), `cover_pool` and `cover_rate` (triggered rows that keep their label),
    `poison_rows` (how training rows look, if they do not look like test images), `adversarial`
    (training rows that are adversarial examples below the trigger), `poison_augmentation`,
    `eligible`, `further` and `further_tests` (evaluation), or `dynamic` and `poison_batch` (no
    fixed rows: every batch is poisoned again).

    Args:
        target: Target class: its label, or its name. Not used by all_to_all.
        rate: Share of poisoned rows, in (0, 1], relative to `rate_base`.
        rate_base: "dataset" (all rows) or "target_class" (rows of the target class).
        label_rule: "all_to_one" (y becomes `target`), "all_to_all" (y becomes (y + 1) mod C) or
            "clean_label" (only rows of the target class are poisoned; labels stay).
        exclude_target: Leave rows of the target class out of the pool (only all_to_one). The
            rate stays relative to `rate_base`.
        seed: Seed of the selection, independent of every other seed.
        quantize: How triggered pixels go back to 8 bits.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    cover_rate: float = 0.0
    """Covers as a share of all rows."""

    rate_bases: tuple[RateBase, ...] = ("dataset", "target_class")
    """What `rate` may be a share of."""

    further: ClassVar[tuple[str, ...]] = ()
    """Names of the test sets that `further_tests` makes, in its order."""

    class_arguments: ClassVar[tuple[str, ...]] = ("target",)
    """Arguments that hold a class, or several; `name:2` is the class of that name, 2 the label."""

    class_names: tuple[str, ...] = ()
    """Of the data set, in the order of its labels."""

    poison_augmentation: AugmentationName = "none"
    """What the attacker applies to the poisoned rows (not to covers) whenever a training batch
    shows them, before the victim's own augmentation."""

    survives_blur: bool = True
    """False if the blur of SimCLR's views leaves little of the trigger."""

    def __init__(
        self,
        target: int | str = 0,
        rate: float = 0.1,
        rate_base: RateBase = "dataset",
        label_rule: LabelRule = "all_to_one",
        exclude_target: bool = False,
        seed: int = 0,
        quantize: Quantize = "round",
    ) -> None:
        require(is_between(rate, 0, 1) and rate > 0, "rate", rate, "in (0, 1]")
        bases = "one of " + ", ".join(self.rate_bases)
        require(rate_base in self.rate_bases, "rate_base", rate_base, bases)
        require_choice("label_rule", label_rule, LabelRule)
        require_choice("quantize", quantize, Quantize)
        require_integer("seed", seed, 0)
        require(
            label_rule != "all_to_all" or rate_base == "dataset",
            "rate_base",
            rate_base,
            "dataset with label_rule all_to_all, which has no target class",
        )
        require(
            label_rule == "all_to_one" or not exclude_target,
            "exclude_target",
            exclude_target,
            f"false with label_rule {label_rule}",
        )
        self.target = check_class("target", target)
        self.rate = rate
        self.rate_base = rate_base
        self.label_rule = label_rule
        self.exclude_target = exclude_target
        self.seed = seed
        self.quantize = quantize

    def name_classes(self, names: Sequence[str]) -> None:
        """Takes labels for the names among `class_arguments`.

        Args:
            names: Of the classes, in the order of their labels; none where they have no names.

        Raises:
            AttackError: There is no class of such a name.
        """
        if not self.class_names:
            warn_of_numbers(self.single_target(), names)
        for key in self.class_arguments:
            value = getattr(self, key)
            if isinstance(value, list):
                setattr(self, key, [labelled(key, each, names) for each in value])
            elif value is not None:
                setattr(self, key, labelled(key, value, names))
        self.class_names = tuple(names)

    @abstractmethod
    def make_trigger(self, size: tuple[int, int]) -> Trigger:
        """Builds the trigger for images of one size.

        Args:
            size: Height and width in pixels, after resizing to the network's input.

        Raises:
            AttackError: The trigger does not fit the size, or its picture cannot be read.
        """

    @final
    def plan(self, labels: Tensor, num_classes: int) -> PoisonPlan:
        """Selects the rows to poison.

        n = round(rate * size of the base), drawn without replacement from the pool: all rows,
        or those of (clean_label) or outside (exclude_target) the target class. A pool smaller
        than n is poisoned whole, with a warning. Covers are drawn in the same way from what
        is left of theirs. The plan of a dynamic attack touches no row.

        Args:
            labels: True labels of the training set, (N,), integers in [0, num_classes).
            num_classes: Number of classes C.

        Raises:
            AttackError: Labels or target do not fit `num_classes`, or nothing can be poisoned.
        """
        labels = self._checked(labels, num_classes)
        if self.dynamic:
            poison = cover = torch.empty(0, dtype=torch.int64)
        else:
            poison = self._draw_poison(labels)
            cover = self._draw_covers(labels, poison)
        seen = labels.clone()
        if self.label_rule != "clean_label":
            seen[poison] = self.wanted_label(labels[poison], num_classes)
        return PoisonPlan(
            poison_index=poison,
            cover_index=cover,
            labels_seen=seen,
            labels_true=labels,
            rate=self.rate,
            rate_base=self.rate_base,
            num_samples=len(labels),
            attack=type(self).__name__,
            target=self.single_target(),
            label_rule=self.label_rule,
            seed=self.seed,
        )

    def wanted_label(self, labels: Tensor, num_classes: int) -> Tensor:
        """What the attacker wants the model to answer for triggered images, shape of `labels`."""
        if self.label_rule == "all_to_all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        """Which test rows count for the attack success rate, bool, shape of `labels`.

        Images of the target class do not: a clean model answers the target for them as well.
        """
        if self.label_rule == "all_to_all":
            return torch.ones_like(labels, dtype=torch.bool)
        return labels != self.target

    # ------------------------------------------------------------------ what subclasses change

    def check_classes(self, labels: Tensor, num_classes: int) -> None:
        """Raises an AttackError where a class of the attack is none of the data set's.

        Args:
            labels: True labels, (N,), integers in [0, num_classes).
            num_classes: Number of classes C.
        """
        if self.label_rule != "all_to_all":
            require_class("target", self.target, num_classes)

    def base_size(self, labels: Tensor) -> int:
        """Number of rows that `rate` is a share of."""
        of_class = self.rate_base == "target_class"
        return int((labels == self.target).sum()) if of_class else len(labels)

    def pool(self, labels: Tensor) -> Tensor:
        """Which rows may be poisoned, bool, shape of `labels` (true labels)."""
        if self.label_rule == "clean_label":
            return labels == self.target
        if self.exclude_target:
            return labels != self.target
        return torch.ones_like(labels, dtype=torch.bool)

    def cover_pool(self, labels: Tensor) -> Tensor:
        """Which rows may become covers unless they are poisoned, bool, shape of `labels`."""
        return torch.ones_like(labels, dtype=torch.bool)

    def poison_rows(self, images: Tensor, plan: PoisonPlan, trigger: Trigger) -> Tensor:
        """The training versions of the rows that the plan touches.

        Args:
            images: The rows `plan.touched_index`, uint8, (P, 3, H, W): clean, or adversarial
                examples if the attack asks for them (`adversarial`).
            plan: The attack's own plan.
            trigger: The attack's own trigger.

        Returns:
            A new uint8 tensor of the same shape.
        """
        return trigger.poison(images)

    @property
    def adversarial(self) -> Adversarial | None:
        """Which adversarial examples `poison_rows` gets; None if it gets clean rows."""
        return None

    def further_tests(
        self, images: Tensor, labels: Tensor, trigger: Trigger
    ) -> dict[str, FurtherTest]:
        """More test sets of this attack, by their names, which are those of `further`.

        Args:
            images: All test images, clean, uint8, (N, 3, H, W).
            labels: Their true labels, (N,).
            trigger: The attack's own trigger.
        """
        return {}

    @property
    def dynamic(self) -> bool:
        """Whether the attacker controls training and poisons every batch again."""
        return False

    def require_stamper(self, module: object) -> None:  # noqa: B027  (most take any module)
        """Refuses a module that must stamp the images itself, because it learns the trigger.

        Args:
            module: Who trains or measures on the images of the data module; None for nobody.

        Raises:
            AttackError: The module does not stamp them, so that they would carry no trigger.
        """

    def poison_batch(
        self,
        images: Tensor,
        labels: Tensor,
        trigger: Trigger,
        num_classes: int,
        place: BatchPlace,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Poisons a training batch of a dynamic attack, before it is augmented.

        Args:
            images: Clean images, float in [0, 1], (B, 3, H, W); not changed in place.
            labels: True labels, (B,).
            trigger: The attack's own trigger, on the device of the images.
            num_classes: Number of classes C.
            place: Of this part of the batch, where several devices share it.
            generator: On the device of the images; the only source of randomness.

        Returns:
            Images as they would be stored (`Trigger.as_stored`) and labels, both new.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The attack's name and the constructor's arguments, ready for JSON; of files the name.

        These are the arguments that the attack keeps under their own name.
        """
        kept = [name for name in _arguments(type(self)) if hasattr(self, name)]
        settings = {name: recorded(getattr(self, name)) for name in kept}
        target = self.single_target()
        if target is not None and target < len(self.class_names):
            settings["target_name"] = self.class_names[target]
        return {"attack": type(self).__name__, **settings, "target": target}

    def _draw_poison(self, labels: Tensor) -> Tensor:
        pool = returned(self, "pool", self.pool(labels), Tensor).nonzero().flatten()
        if not len(pool):
            has = "has" if self.label_rule == "clean_label" else "does not consist of"
            raise AttackError(
                f"target={self.target}: with label_rule {self.label_rule} it leaves no row to "
                f"poison among {len(labels)}; choose a target class that the data set {has}."
            )
        wanted = self._num_wanted(labels)
        if wanted > len(pool):
            warnings.warn(
                f"rate={self.rate}: this share of the {self.rate_base} is "
                f"{counted(wanted, 'row')}, but only {len(pool):,} may be poisoned; all of them "
                "are.",
                stacklevel=3,  # the caller of `plan`
            )
        return self._draw("poison", pool, wanted)

    def _draw_covers(self, labels: Tensor, poison: Tensor) -> Tensor:
        free = self.cover_pool(labels) if self.cover_rate else torch.zeros_like(labels).bool()
        free[poison] = False
        pool = free.nonzero().flatten()
        wanted = round(self.cover_rate * len(labels))
        if wanted > len(pool):
            warnings.warn(
                f"cover_rate={self.cover_rate}: this share is {counted(wanted, 'row')}, but only "
                f"{len(pool):,} may be covers; all of them are.",
                stacklevel=3,  # the caller of `plan`
            )
        return self._draw("cover", pool, wanted)

    def _draw(self, purpose: str, pool: Tensor, wanted: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(purpose, self.seed))
        drawn = torch.randperm(len(pool), generator=generator)[:wanted]
        return pool[drawn].sort().values

    def single_target(self) -> int | None:
        """The class that the attack aims at; None where each class has its own."""
        return None if self.label_rule == "all_to_all" else self.target

    def _checked(self, labels: Tensor, num_classes: int) -> Tensor:
        labels = checked_labels(labels, num_classes)
        self.check_classes(labels, num_classes)
        return labels

    def _num_wanted(self, labels: Tensor) -> int:
        base = self.base_size(labels)
        wanted = round(self.rate * base)
        require(
            wanted > 0,
            "rate",
            self.rate,
            f"large enough to give one row or more of the {base} in the {self.rate_base}",
        )
        return wanted


def _arguments(attack: type[Attack]) -> list[str]:
    """Names of the arguments of an attack's constructors, those of the base first."""
    classes = [each for each in reversed(attack.__mro__) if issubclass(each, Attack)]
    names = [name for each in classes for name in inspect.signature(each).parameters]
    return list(dict.fromkeys(names))
