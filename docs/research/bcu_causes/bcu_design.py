"""The cells of `bcu_causes.py`: a base, and what is changed around it."""

from dataclasses import dataclass, replace
from typing import Any

from bcu_mechanism import Norm

from bdclean.attacks.badnets import Position
from bdclean.functional.reinitialisation import Strategy
from bdclean.functional.schedules import Schedule
from bdclean.types import AugmentationName


@dataclass(frozen=True)
class Victim:
    """How the backdoored model is made: SGD, momentum 0.9, on 900 digits."""

    width: int = 8
    position: Position = "top_left"
    rate: float = 0.1
    epochs: int = 15
    lr: float = 0.1
    schedule: Schedule = "onecycle"
    weight_decay: float = 5e-4
    batch_size: int = 64
    augmentation: AugmentationName = "none"


@dataclass(frozen=True)
class Cleansing:
    """Settings of `AblatedBCU`; the defaults are the method's, for 300 images."""

    lr: float = 0.01
    epochs: int = 60
    batch_size: int = 100
    augmentation: AugmentationName = "crop"
    strategy: Strategy = "increasing"
    strength: float = 1.0
    single_group: int = 0
    weight_scale: float = 1.0
    fresh_scale: float = 1.0
    norm: Norm = "batch"


@dataclass(frozen=True)
class Cell:
    """One setting, and the name under which it is reported.

    Attributes:
        factor: What differs from the base cell.
        level: In which way.
        victim: How the victim is made.
        bcu: How it is cleansed.
        distil: Whether the student is trained, and not only re-initialised.
    """

    factor: str
    level: str
    victim: Victim = Victim()
    bcu: Cleansing = Cleansing()
    distil: bool = True


def design(victim: Victim = Victim(), bcu: Cleansing = Cleansing()) -> list[Cell]:
    """The cells, the most telling ones first."""

    def ours(factor: str, level: str, **changes: Any) -> Cell:
        return Cell(factor, level, victim, replace(bcu, **changes))

    def theirs(factor: str, level: str, more: Cleansing = bcu, **changes: Any) -> Cell:
        return Cell(factor, level, replace(victim, **changes), more)

    slow: dict[str, Any] = {"lr": 0.01, "schedule": "multistep", "epochs": 60}
    corner, fast = "bottom_right", replace(bcu, lr=0.05)
    return [
        Cell("base", "", victim, bcu),
        *_not_distilled(victim, bcu),
        ours("distillation rate", "0.05", lr=0.05),
        ours("re-initialisation", "none", strategy="none"),
        ours("re-initialisation and rate", "none, 0.05", strategy="none", lr=0.05),
        ours("strength", "2", strength=2.0),
        ours("fresh scale", "2", fresh_scale=2.0),
        ours("weight scale", "1/2", weight_scale=0.5),
        ours("both scales", "1/2", weight_scale=0.5, fresh_scale=0.5),
        ours("batch norm", "frozen", norm="frozen"),
        theirs("corner", "bottom right", position=corner),
        theirs("victim training", "steps from 0.01, 60 epochs", **slow),
        ours("fresh scale", "4", fresh_scale=4.0),
        ours("rate and strength", "0.05, 2", lr=0.05, strength=2.0),
        theirs("corner and rate", "bottom right, 0.05", fast, position=corner),
        theirs("width", "16", width=16),
        ours("distillation length", "180 epochs", epochs=180),
        theirs("victim training and rate", "steps from 0.01, 60 epochs; 0.05", fast, **slow),
        theirs("poisoning rate", "2 %", rate=0.02),
        ours("one group", "layer1", strategy="single_stage", single_group=0),
        ours("one group", "layer2", strategy="single_stage", single_group=1),
        ours("one group", "layer3", strategy="single_stage", single_group=2),
        ours("one group", "layer4", strategy="single_stage", single_group=3),
        ours("strength", "3.5", strength=3.5),
        theirs("victim training", "weight decay 0.01", weight_decay=0.01),
        theirs("corner", "centre", position="center"),
        ours("batch norm and re-initialisation", "frozen, none", norm="frozen", strategy="none"),
        ours("augmentation", "none", augmentation="none"),
    ]


def _not_distilled(victim: Victim, bcu: Cleansing) -> list[Cell]:
    """Re-initialisation by itself: all groups at several strengths, and one group alone."""
    cells = [
        Cell("strength, not distilled", f"{s:g}", victim, replace(bcu, strength=s), distil=False)
        for s in (2.0, 3.5)
    ]
    for group in range(4):
        for share, strength in (("22 %", 1.0), ("100 %", 5.0)):
            one = replace(bcu, strategy="single_stage", single_group=group, strength=strength)
            level = f"layer{group + 1}, {share}"
            cells.append(Cell("one group, not distilled", level, victim, one, distil=False))
    return cells
