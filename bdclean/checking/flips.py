"""Where small perturbations send a classifier's answers: with a backdoor, into its target class.

Each family of perturbations (`bdclean.functional.families`) changes the answers to a few hundred
unlabelled images as far as it can. On a clean network they scatter over the classes; along a
backdoor of the family's kind they pile up in one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.functional.distillation import divergence
from bdclean.functional.families import (
    PROBED_AT_ONCE,
    PROBES,
    Concentration,
    Distance,
    Family,
    concentrated,
)
from bdclean.functional.precision import fast_format
from bdclean.functional.seeds import derive_seed

TEMPERATURE = 2.0  # of the divergence that is maximised; as in shortcut distillation


@dataclass(frozen=True)
class Flips:
    """What one family does to the answers.

    Attributes:
        family: Its name.
        images: How many.
        landed: Answers that it changed to each class, (K,).
    """

    family: str
    images: int
    landed: tuple[int, ...]

    @property
    def concentration(self) -> Concentration:
        """The same as shares."""
        return concentrated(torch.tensor(self.landed), self.images)


def count_flips(
    model: SplitModel, images: Tensor, families: Mapping[str, Family] = PROBES, seed: int = 0
) -> Iterator[Flips]:
    """Perturbs images in each family and counts where the answers land.

    Args:
        model: A classifier; left as it is.
        images: (N, 3, H, W), float32 in [0, 1], on the model's device.
        families: By name.
        seed: Of places and starts.

    Yields:
        What each family did, in their order.
    """
    head = model.require_head()
    count, training = model.info.num_classes or 0, model.training
    model.eval()
    try:
        with fast_format(images.device.type), perturb_precision(images.device.type) as dtype:
            copy = Perturber(model, "eval", dtype)
            images = images.contiguous(memory_format=torch.channels_last)

            def predict(x: Tensor) -> Tensor:
                logits: Tensor = head(copy.features(x).float())
                return logits.float()

            for name, family in families.items():
                landed = torch.zeros(count, dtype=torch.long)
                for number, x in enumerate(
                    torch.split(
                        images.contiguous(memory_format=torch.channels_last), PROBED_AT_ONCE
                    )
                ):
                    seeded = derive_seed("flips", name, seed, number)
                    draw = torch.Generator(x.device).manual_seed(seeded)
                    before, after = _answers(x, predict, family, draw)
                    landed += torch.bincount(after[after != before], minlength=count).cpu()
                yield Flips(name, len(images), tuple(landed.tolist()))
    finally:
        model.train(training)


def _answers(
    x: Tensor, predict: Distance, family: Family, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = predict(x)
    moved = family(x, lambda z: divergence(logits, predict(z), TEMPERATURE), draw)
    with torch.no_grad():
        return logits.argmax(1), predict(moved).argmax(1)
