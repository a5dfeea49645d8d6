"""Where small perturbations send a classifier's answers: with a backdoor, into its target class.

Each family of perturbations (`bdclean.functional.families`) changes the answers to a few hundred
unlabelled images as far as it can. On a clean network they scatter over the classes; along a
backdoor of the family's kind they pile up in one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from bdclean.progress import Advance, Watch, unwatched

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
    model: SplitModel,
    images: Tensor,
    families: Mapping[str, Family] = PROBES,
    seed: int = 0,
    watch: Watch = unwatched,
) -> Iterator[Flips]:
    """Perturbs images in each family and counts where the answers land.

    Args:
        model: A classifier; left as it is.
        images: (N, 3, H, W), float32 in [0, 1], on the model's device.
        families: By name.
        seed: Of places and starts.
        watch: Shows how far it is.

    Yields:
        What each family did, in their order.
    """
    count, training = model.info.num_classes or 0, model.training
    images = images.contiguous(memory_format=torch.channels_last)
    model.eval()
    try:
        with folded(model, images.device.type) as predict:
            for name, family in families.items():
                landed = torch.zeros(count, dtype=torch.long)
                parts = torch.split(images, PROBED_AT_ONCE)
                steps = len(parts) * getattr(family, "steps", 0)
                with watch(steps, name, "steps") as advance:
                    for number, x in enumerate(parts):
                        drawn = derive_seed("flips", name, seed, number)
                        moved = perturbed(x, predict, family, drawn, advance)
                        with torch.no_grad():
                            before, after = (predict(each).argmax(1) for each in (x, moved))
                        landed += torch.bincount(after[after != before], minlength=count).cpu()
                yield Flips(name, len(images), tuple(landed.tolist()))
    finally:
        model.train(training)


@contextmanager
def folded(model: SplitModel, device_type: str) -> Iterator[Distance]:
    """A folded copy of a classifier in evaluation mode, in the format that is fast.

    Yields:
        Maps images (B, 3, H, W) to logits (B, K), differentiable in the images.
    """
    head = model.require_head()
    with fast_format(device_type), perturb_precision(device_type) as dtype:
        copy = Perturber(model, "eval", dtype)
        yield lambda x: head(copy.features(x).float()).float()


def perturbed(
    x: Tensor,
    predict: Distance,
    family: Family,
    seed: int,
    advance: Advance = lambda _: None,
) -> Tensor:
    """Images (B, 3, H, W) that a family has changed so that the answers change most.

    Args:
        x: The images.
        predict: Maps images to logits.
        family: Of perturbations.
        seed: Of places and starts.
        advance: Counts steps.
    """
    draw = torch.Generator(x.device).manual_seed(seed)
    with torch.no_grad():
        wanted = predict(x)

    def distance(moved: Tensor) -> Tensor:
        advance(1)
        return divergence(wanted, predict(moved), TEMPERATURE)

    return family(x, distance, draw)
