"""Families of perturbations that change a network's answer most, of the kinds that triggers are.

A backdoor is the shortest way to change the answer, so many of these perturbations run along it.
`concentration` tells whether they do: the answers that they change pile up in its target class.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bdclean.errors import ConfigError
from bdclean.functional.pgd import PGD, pgd

Distance = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W) to how far the answers are from those to the unchanged images, (B,)."""


class Family(Protocol):
    """How images are perturbed."""

    def __call__(
        self, images: Tensor, distance: Distance, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images that the network answers otherwise.

        Args:
            images: (B, 3, H, W), in [0, 1]; left as they are.
            distance: What is maximised, summed over the batch.
            generator: Of places, sizes and starts, on the device of the images; None: torch's own.

        Returns:
            (B, 3, H, W), in [0, 1], detached.
        """


@dataclass(frozen=True)
class Ball:
    """Every image has a perturbation of its own, everywhere and small.

    For triggers that are blended over the image or warp it.

    Attributes:
        epsilon: Radius of the L-infinity ball, in 8-bit pixel values.
        steps: Of the ascent.
        step_size: Of a step, in radii.

    Raises:
        ConfigError: If a value is out of its range.
    """

    epsilon: float = 8.0
    steps: int = 5
    step_size: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values."""
        _ = self.pgd

    @property
    def pgd(self) -> PGD:
        """The ascent."""
        return PGD(self.epsilon, self.steps, self.step_size)

    def __call__(
        self, images: Tensor, distance: Distance, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `Family`."""
        return pgd(images, lambda moved: distance(moved).sum(), self.pgd, generator)


@dataclass(frozen=True)
class Patch:
    """A square at a random place is free to take any colours.

    Attributes:
        sides: Least and largest side, as shares of the image's; drawn for each image, uniformly in
            whole pixels.
        steps: Of the ascent.
        step_size: Of a step, in the range of pixels.

    Raises:
        ConfigError: If a value is out of its range.
    """

    sides: tuple[float, float] = (0.1, 0.19)
    steps: int = 5
    step_size: float = 0.3

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 < self.sides[0] <= self.sides[1] <= 1:
            raise ConfigError(
                f"patch.sides={list(self.sides)}: it must be the least and the largest side, above "
                "0 and at most 1."
            )
        _ = self.pgd

    @property
    def pgd(self) -> PGD:
        """The ascent."""
        return PGD(255.0, self.steps, self.step_size)

    def __call__(
        self, images: Tensor, distance: Distance, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `Family`."""
        mask = draw_squares(images, self.sides, generator)

        def apart(moved: Tensor) -> Tensor:
            return distance(torch.where(mask, moved, images)).sum()

        return torch.where(mask, pgd(images, apart, self.pgd, generator), images)


@dataclass(frozen=True)
class Universal:
    """One perturbation for all images of a batch, which is what a trigger is.

    Attributes:
        epsilon: Least and largest radius of the L-infinity ball, in 8-bit pixel values; drawn for
            each batch, uniformly.
        steps: Of the ascent.
        step_size: Of a step, in radii.

    Raises:
        ConfigError: If a value is out of its range.
    """

    epsilon: tuple[float, float] = (4.0, 12.0)
    steps: int = 8
    step_size: float = 0.3

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 <= self.epsilon[0] <= self.epsilon[1] <= 127:
            raise ConfigError(
                f"universal.epsilon={list(self.epsilon)}: it must be the least and the largest "
                "radius, between 0 and 127."
            )
        _ = self.pgd(self.epsilon[1])

    def pgd(self, epsilon: float) -> PGD:
        """The ascent in a ball of this radius."""
        return PGD(epsilon, self.steps, self.step_size)

    def __call__(
        self, images: Tensor, distance: Distance, generator: torch.Generator | None = None
    ) -> Tensor:
        """See `Family`."""
        drawn = torch.rand((), generator=generator, device=images.device).item()
        epsilon = self.epsilon[0] + drawn * (self.epsilon[1] - self.epsilon[0])
        grey = torch.full_like(images[:1], 0.5)  # from which no perturbation leaves [0, 1]

        def apart(moved: Tensor) -> Tensor:
            return distance((images + moved - grey).clamp(0, 1)).sum()

        moved = pgd(grey, apart, self.pgd(epsilon), generator)
        return (images + moved - grey).clamp(0, 1)


def draw_squares(
    images: Tensor, sides: tuple[float, float], generator: torch.Generator | None = None
) -> Tensor:
    """Squares inside the images, one for each.

    Args:
        images: (B, 3, S, S).
        sides: Least and largest, as shares of S; at least one pixel.
        generator: On the device of the images.

    Returns:
        (B, 1, S, S), bool.
    """
    size, device = images.shape[-1], images.device
    least, most = (max(1, round(side * size)) for side in sides)
    draw = torch.rand((3, len(images)), generator=generator, device=device)
    side = least + (draw[0] * (most - least + 1)).long().clamp(max=most - least)
    first = (draw[1:] * (size - side + 1)).long().minimum(size - side)[:, :, None]  # (2, B, 1)
    line = torch.arange(size, device=device)
    rows, columns = ((line >= first) & (line < first + side[:, None])).unbind()  # (B, S) each
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@dataclass(frozen=True)
class Concentration:
    """Where a family sends the answers that it changes.

    Attributes:
        flipped: Share of the images whose class changes.
        share: Of those, the share that lands in `favourite`; 0 where none changes.
        favourite: The class in which most of them land.
    """

    flipped: float
    share: float
    favourite: int

    @property
    def piled(self) -> float:
        """Share of all images whose class changes to `favourite`; compared with `PILED`."""
        return self.flipped * self.share

    amount = piled

    def agrees(self, other: "Concentration") -> bool:
        """Whether both pile up in the same class."""
        return self.favourite == other.favourite


PROBES: Mapping[str, Family] = {
    "ball": Ball(8.0, 10, 0.25),
    "patch": Patch((0.15, 0.15), 10, 0.3),
    "universal 4": Universal((4.0, 4.0), 24, 0.15),
    "universal 8": Universal((8.0, 8.0), 24, 0.15),
}
"""What looks for a backdoor, by name; the first word is that of its family."""

PILED = {"ball": 0.25, "patch": 0.2, "universal 4": 0.15, "universal 8": 0.5}
"""Share of all images above which the answers that a probe sends to one class are out of line with
clean networks; docs/research/check has what these and attacked networks gave."""

PROBED_AT_ONCE = 128  # images that share a universal perturbation
LEAST_CLASSES = 6  # with fewer, flips pile up in one class anyway
FEWEST_IMAGES = 100  # with fewer, no share of them tells anything


class Seen(Protocol):
    """What a probe gave: `Concentration`, or `gathering.Gathering` of features."""

    @property
    def amount(self) -> float:
        """Large along a backdoor, at most 1."""

    def agrees(self, other: Any) -> bool:
        """Whether another one leads to the same target."""


def out_of_line(found: Mapping[str, Seen], bounds: Mapping[str, float] = PILED) -> tuple[str, ...]:
    """Probes that see what is out of line with clean networks.

    A trigger has one target. So of the probes above their bound only those count that agree with
    the one that is farthest above it.

    Args:
        found: What each probe gave, by the names of `PROBES`.
        bounds: By the same names.

    Returns:
        Their names; none where no probe is above its bound.
    """
    above = {name: each for name, each in found.items() if each.amount > bounds[name]}
    if not above:
        return ()
    room = {name: (each.amount - bounds[name]) / (1 - bounds[name]) for name, each in above.items()}
    first = above[max(room, key=room.__getitem__)]
    return tuple(name for name, each in above.items() if each.agrees(first))


def concentration(before: Tensor, after: Tensor, num_classes: int) -> Concentration:
    """Counts where changed answers land.

    Args:
        before: Classes of the unchanged images, (N,).
        after: Classes of the perturbed ones, (N,).
        num_classes: K.
    """
    changed = before != after
    return concentrated(torch.bincount(after[changed], minlength=num_classes), len(before))


def concentrations(
    names: Iterable[str], classes: Tensor, num_classes: int
) -> dict[str, Concentration]:
    """The same for several families.

    Args:
        names: Of F families.
        classes: (1 + F, N), of the unchanged images and under each family.
        num_classes: K.
    """
    rows = zip(names, classes[1:], strict=True)
    return {name: concentration(classes[0], after, num_classes) for name, after in rows}


def concentrated(landed: Tensor, images: int) -> Concentration:
    """Shares of a count of changed answers.

    Args:
        landed: How many changed to each class, (K,).
        images: N.
    """
    total, most = int(landed.sum()), int(landed.max())
    return Concentration(total / max(images, 1), most / max(total, 1), int(landed.argmax()))
