"""Images on which a small perturbation changes the suspect's answer most, as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bdclean.backbones import SplitModel
from bdclean.checking import PROBES
from bdclean.checking.flips import TEMPERATURE, folded, perturbed
from bdclean.functional.distillation import divergence
from bdclean.functional.families import Family
from bdclean.functional.seeds import derive_seed

_SHOWN = ("patch", "universal 8")
_AT_MOST = 64  # images that are perturbed
_SIDE = 112  # pixels of a picture, at most


@dataclass(frozen=True)
class Answer:
    """What a model names an image, and its probability."""

    label: int
    share: float


@dataclass(frozen=True)
class Example:
    """One image, perturbed.

    Attributes:
        family: Of the perturbation.
        clean: (3, S, S), uint8, S at most 112.
        moved: The same, perturbed.
        difference: How much they differ, times `amplified`.
        amplified: A whole number, the same for all examples of a family.
        suspect: Its answers to the clean and to the perturbed image.
        cleaned: Those of the cleaned model.
    """

    family: str
    clean: Tensor
    moved: Tensor
    difference: Tensor
    amplified: int
    suspect: tuple[Answer, Answer]
    cleaned: tuple[Answer, Answer]

    @property
    def flips(self) -> bool:
        """Whether the suspect's answer changes."""
        return self.suspect[0].label != self.suspect[1].label


def most_flipped(
    suspect: SplitModel, cleaned: SplitModel, images: Tensor, each: int = 2
) -> list[Example]:
    """The images whose answers change most, by family.

    Args:
        suspect: In evaluation mode; its answers are those that are changed.
        cleaned: In evaluation mode.
        images: (N, 3, S, S), float32 in [0, 1], on the device of both.
        each: How many of each family.
    """
    families: Mapping[str, Family] = {name: PROBES[name] for name in _SHOWN}
    x = images[:_AT_MOST].contiguous()
    found = []
    for name, family in families.items():
        with folded(suspect, x.device.type) as predict:
            moved = perturbed(x, predict, family, derive_seed("examples", name))
        with torch.no_grad():
            before, after = suspect(x).float(), suspect(moved).float()
            apart = divergence(before, after, TEMPERATURE)
        flips = before.argmax(1) != after.argmax(1)
        rows = (apart + flips * (1 + apart.max())).argsort(descending=True)[:each]
        most = float((moved[rows] - x[rows]).abs().max())
        show = partial(_example, name, suspect, cleaned, max(1, int(1 / max(most, 1 / 255))))
        found += [show(x[row], moved[row]) for row in rows.tolist()]
    return found


@torch.no_grad()
def _example(
    name: str,
    suspect: SplitModel,
    cleaned: SplitModel,
    amplified: int,
    clean: Tensor,
    moved: Tensor,
) -> Example:
    both = torch.stack([clean, moved])
    return Example(
        name,
        _small(clean),
        _small(moved),
        _small((moved - clean).abs() * amplified),
        amplified,
        _answers(suspect, both),
        _answers(cleaned, both),
    )


def _answers(model: SplitModel, both: Tensor) -> tuple[Answer, Answer]:
    shares = model(both).float().softmax(1)
    first, second = (Answer(int(each.argmax()), float(each.max())) for each in shares)
    return first, second


def _small(image: Tensor) -> Tensor:
    if image.shape[-1] > _SIDE:
        image = interpolate(image[None], size=_SIDE, mode="area")[0]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
