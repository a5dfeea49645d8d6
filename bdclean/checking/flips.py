"""Where small perturbations send a network's answers: with a backdoor, to its target.

Each family of perturbations (`bdclean.functional.families`) changes the answers to a few hundred
unlabelled images as far as it can. On a clean classifier they scatter over the classes; along a
backdoor of the family's kind they pile up in one. A backbone without a head has features for
answers, and those gather in one point.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.functional.distillation import divergence, feature_distance
from bdclean.functional.families import (
    PROBED_AT_ONCE,
    PROBES,
    Concentration,
    Distance,
    Family,
    concentrated,
)
from bdclean.functional.gathering import Gathering, gathering
from bdclean.functional.precision import fast_format
from bdclean.functional.seeds import derive_seed
from bdclean.progress import Advance, Watch, unwatched

TEMPERATURE = 2.0  # of the divergence that is maximised; as in shortcut distillation
Apart = Callable[[Tensor, Tensor], Tensor]
"""How far answers are from others, both (B, K): (B,)."""


@dataclass(frozen=True)
class Flips:
    """What one family does to the answers of a classifier.

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


@dataclass(frozen=True)
class Gathered:
    """What one family does to the features of a backbone.

    Attributes:
        family: Its name.
        images: How many.
        gathering: How far the features gather in one point.
    """

    family: str
    images: int
    gathering: Gathering


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
    model.require_head()
    count = model.info.num_classes or 0
    for name, *answers in _moved(model, images, families, seed, watch, head=True):
        before, after = (each.argmax(1) for each in answers)
        landed = torch.bincount(after[after != before], minlength=count)
        yield Flips(name, len(images), tuple(landed.tolist()))


def gather_features(
    model: SplitModel,
    images: Tensor,
    families: Mapping[str, Family] = PROBES,
    seed: int = 0,
    watch: Watch = unwatched,
) -> Iterator[Gathered]:
    """Perturbs images in each family and measures whether the features gather.

    Args:
        model: With or without a head, which plays no part; left as it is.
        images: (N, 3, H, W), float32 in [0, 1], on the model's device.
        families: By name.
        seed: Of places and starts.
        watch: Shows how far it is.

    Yields:
        What each family did, in their order.
    """
    for name, before, after in _moved(model, images, families, seed, watch, head=False):
        yield Gathered(name, len(images), gathering(before, after))


def _moved(
    model: SplitModel,
    images: Tensor,
    families: Mapping[str, Family],
    seed: int,
    watch: Watch,
    *,
    head: bool,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of each family, and the answers before and after, (N, K), on the CPU."""
    training = model.training
    images = images.contiguous(memory_format=torch.channels_last)
    parts, apart = torch.split(images, PROBED_AT_ONCE), _flips if head else feature_distance
    model.eval()
    try:
        with folded(model, images.device.type, head=head) as answer:
            for name, family in families.items():
                before, after = [], []
                with watch(len(parts) * getattr(family, "steps", 0), name, "steps") as advance:
                    for number, x in enumerate(parts):
                        drawn = derive_seed("flips", name, seed, number)
                        moved = perturbed(x, answer, family, drawn, apart, advance)
                        with torch.no_grad():
                            before.append(answer(x).cpu())
                            after.append(answer(moved).cpu())
                yield name, torch.cat(before), torch.cat(after)
    finally:
        model.train(training)


@contextmanager
def folded(model: SplitModel, device_type: str, *, head: bool = True) -> Iterator[Distance]:
    """A folded copy of a network in evaluation mode, in the format that is fast.

    Args:
        model: The network.
        device_type: Where it computes.
        head: Whether answers are logits, and not features.

    Yields:
        Maps images (B, 3, H, W) to answers (B, K), differentiable in the images.
    """
    last = model.require_head() if head else torch.nn.Identity()
    with fast_format(device_type), perturb_precision(device_type) as dtype:
        copy = Perturber(model, "eval", dtype)
        yield lambda x: last(copy.features(x).float()).float()


def _flips(wanted: Tensor, answers: Tensor) -> Tensor:
    return divergence(wanted, answers, TEMPERATURE)


def perturbed(
    x: Tensor,
    answer: Distance,
    family: Family,
    seed: int,
    apart: Apart = _flips,
    advance: Advance = lambda _: None,
) -> Tensor:
    """Images (B, 3, H, W) that a family has changed so that the answers change most.

    Args:
        x: The images.
        answer: Maps images to logits or features.
        family: Of perturbations.
        seed: Of places and starts.
        apart: What is maximised.
        advance: Counts steps.
    """
    draw = torch.Generator(x.device).manual_seed(seed)
    with torch.no_grad():
        wanted = answer(x)

    def distance(moved: Tensor) -> Tensor:
        advance(1)
        return apart(wanted, answer(moved))

    return family(x, distance, draw)
