"""A backdoor of our own in a copy of the suspect: does the purification remove that one?

The copy learns two triggers, a patch and a blended pattern, from the images at hand; their labels
are the suspect's own answers. It is then purified as the suspect was. The attacker's trigger stays
unknown, but these two are known, so that their success can be measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.attacks import BadNets, Blend, Trigger
from bdclean.backbones import SplitModel
from bdclean.errors import ConfigError, counted
from bdclean.functional.precision import fast_format
from bdclean.functional.seeds import derive_seed

EPOCHS = 5
_LR, _BATCH = 0.01, 64
_SHARE = 0.1  # of a batch that gets each trigger, with its class
_HELD_OUT = 0.2  # of the images, on which success is measured
_FEWEST = 50  # images
_AT_ONCE = 256
_LEARNED = 50.0  # percent of triggered images that get the class, at least
UNLEARNED = "The copy has hardly learned it, so that this says nothing of the purification."

Purify = Callable[[SplitModel], SplitModel]


@dataclass(frozen=True)
class Canary:
    """What became of one trigger of ours.

    Attributes:
        trigger: What it is.
        before: Share of triggered images that get its class, in percent, in the copy; None where
            nothing was measured.
        after: The same after its purification.
        images: How many; none that the suspect names by that class.
        why: Nothing was measured; a sentence without its full stop, else empty.
    """

    trigger: str
    before: float | None
    after: float | None
    images: int
    why: str = ""

    @property
    def is_unlearned(self) -> bool:
        """Whether the copy has not learned the trigger, so that there was little to remove."""
        return self.before is not None and self.before < _LEARNED

    @property
    def details(self) -> str:
        """On what it was measured, or why not."""
        images = self.why or counted(self.images, "image")
        return f"{images}. {UNLEARNED}" if self.is_unlearned else images


def canary_lines(canaries: Sequence[Canary]) -> list[str]:
    """What became of triggers of ours, in sentences."""
    return [_line(each) for each in canaries]


def _line(canary: Canary) -> str:
    if canary.before is None or canary.after is None:
        return f"Canary, {canary.trigger}: nothing was measured, because {canary.why}."
    return (
        f"Canary, {canary.trigger}: ASR {canary.before:.1f} % before, {canary.after:.1f} % after "
        f"(planted by us in a copy).{f' {UNLEARNED}' if canary.is_unlearned else ''}"
    )


def check_canary(model: SplitModel, count: int, method: str) -> None:
    """Refuses models and images with which there is nothing to plant.

    Raises:
        ConfigError: If the model has no head or a single class, the method leaves none, or images
            are too few.
    """
    if method == "cbd":
        raise ConfigError("--canary: CBD leaves no head, so that no success can be measured.")
    if model.head is None or (model.info.num_classes or 0) < 2:
        raise ConfigError("--canary needs a model with a classifier head of 2 classes or more.")
    if count < _FEWEST:
        raise ConfigError(f"--canary needs {_FEWEST} images or more, and there are {count}.")


def run_canary(suspect: SplitModel, pixels: Tensor, purify: Purify, seed: int = 0) -> list[Canary]:
    """Plants, purifies and measures.

    Args:
        suspect: Left as it is.
        pixels: (N, 3, S, S), uint8.
        purify: Gives the purified copy of a model.
        seed: Of all that is drawn.
    """
    draw = torch.Generator().manual_seed(derive_seed("canary", seed))
    order = torch.randperm(len(pixels), generator=draw)
    held = round(_HELD_OUT * len(pixels))
    answers = _named(suspect, pixels)
    triggers = _triggers(suspect.info.input_size, suspect.info.num_classes or 0)
    rows = order[held:]
    copy = planted(suspect, pixels[rows], answers[rows], triggers, draw)
    cleaned = purify(copy).to(suspect.normalize.mean.device).eval()
    found = []
    for name, (trigger, target) in triggers.items():
        shown = pixels[order[:held]][answers[order[:held]] != target]
        if not len(shown):
            found.append(Canary(name, None, None, 0, _all_named(held, target)))
            continue
        triggered = trigger.poison(shown)
        before, after = (_rate(_named(model, triggered) == target) for model in (copy, cleaned))
        found.append(Canary(name, before, after, len(shown)))
    return found


def planted(
    suspect: SplitModel,
    pixels: Tensor,
    answers: Tensor,
    triggers: Mapping[str, tuple[Trigger, int]],
    draw: torch.Generator,
) -> SplitModel:
    """A copy of the suspect that has learned triggers; in evaluation mode.

    Args:
        suspect: Left as it is.
        pixels: (N, 3, S, S), uint8.
        answers: Labels, (N,).
        triggers: With the class of each, by name.
        draw: Of order and choice.
    """
    copy = suspect.copy().train().requires_grad_(True)
    device = copy.normalize.mean.device
    optimizer = torch.optim.SGD(copy.parameters(), lr=_LR, momentum=0.9, weight_decay=5e-4)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(pixels), generator=draw), _BATCH):
            if len(rows) < 2:
                continue
            x, y = pixels[rows].clone(), answers[rows].clone()
            first, number = 0, max(1, round(_SHARE * len(rows)))
            for trigger, target in triggers.values():
                part = slice(first, first + number)
                x[part], y[part], first = trigger.poison(x[part]), target, first + number
            optimizer.zero_grad()
            with torch.enable_grad(), fast_format(device.type):
                logits = copy(x.to(device).float() / 255)
                torch.autograd.backward(F.cross_entropy(logits.float(), y.to(device)))
            optimizer.step()
    return copy.eval()


def _triggers(size: int, classes: int) -> dict[str, tuple[Trigger, int]]:
    side = max(3, round(size / 10))
    patch = BadNets(rate=_SHARE, pattern="white", patch_size=side, position="bottom_right")
    blend = Blend(rate=_SHARE)
    return {
        f"white patch of {side} pixels": (patch.make_trigger((size, size)), 0),
        "blended pattern": (blend.make_trigger((size, size)), min(1, classes - 1)),
    }


@torch.no_grad()
def _named(model: SplitModel, pixels: Tensor) -> Tensor:
    device = model.normalize.mean.device
    parts = (x.to(device).float() / 255 for x in torch.split(pixels, _AT_ONCE))
    return torch.cat([model(x).argmax(1).cpu() for x in parts])


def _rate(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


def _all_named(held: int, target: int) -> str:
    return (
        f"the suspect names all {held} images that were held out class {target}, to which this "
        "trigger leads"
    )
