"""DECREE: how small a trigger makes all images look the same to a backbone? Needs no head.

Feng, Tao, Cheng, Shen, Xu, Liu, Zhang, Ma, Zhang: Detecting Backdoors in Pre-trained Encoders, CVPR
2023 (arXiv:2303.15180). A mask m (S, S) and a pattern p (3, S, S), both in [0, 1], are sought with

    x' = (1 - m) * x + m * p
    loss = - mean over i != j of cos(f(x'_i), f(x'_j)) + weight * sum(m)

where the weight follows the cosine. The statistic is the least mean of m (PL1 in the paper) at
which the mean cosine exceeds 0.99. The trigger of a backdoored encoder is far smaller than what a
clean one needs. It is meant for attacks that give all triggered images one embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.functional.gathering import mean_cosine
from bdclean.functional.precision import fast_format
from bdclean.functional.seeds import derive_seed
from bdclean.progress import Watch, unwatched

LARGE = 64  # pixels; above, the paper's settings for ImageNet hold


@dataclass(frozen=True)
class TriggerSearch:
    """Settings of the search; defaults are those of the authors' code, but for `epochs`.

    Attributes:
        epochs: Passes over the images, at most. The authors allow 1,000.
        batch_size: Images of a step.
        cosine: At which all images count as the same.
        weight: Of the mask at the start, for each pixel and channel.
        factor: By which the weight changes.
        patience: Steps in a row, on one side of `cosine`, after which it changes.
    """

    epochs: int = 100
    batch_size: int = 128
    cosine: float = 0.99
    weight: float = 1e-3
    factor: float = 5.0
    patience: int = 5

    def rate(self, epoch: int) -> float:
        """Learning rate of Adam."""
        return 0.5 if epoch < 30 else 0.1 if epoch < 50 else 0.05


@dataclass(frozen=True)
class SmallestTrigger:
    """Result of the search.

    Attributes:
        share: Least mean of the mask, in [0, 1]; 1 where no trigger was found.
        untouched: Mean cosine of the images without any trigger.
        epochs: How many the search took.
    """

    share: float
    untouched: float
    epochs: int


def smallest_trigger(
    model: SplitModel,
    images: Tensor,
    settings: TriggerSearch = TriggerSearch(),
    seed: int = 0,
    watch: Watch = unwatched,
) -> SmallestTrigger:
    """Searches for it.

    Args:
        model: With or without a head, which plays no part; left as it is.
        images: (N, 3, S, S), float32 in [0, 1], on the model's device; two at least.
        settings: Of the search.
        seed: Of the start and of the order of the images.
        watch: Shows how far it is.
    """
    device, training = images.device, model.training
    model.eval()
    try:
        with fast_format(device.type), perturb_precision(device.type) as dtype:
            copy = Perturber(model, "eval", dtype)
            draw = torch.Generator(device).manual_seed(derive_seed("decree", seed))
            with torch.no_grad():
                parts = torch.split(images, settings.batch_size)
                plain = mean_cosine(torch.cat([copy.features(part).float() for part in parts]))
            search = _Search(copy, images, settings, draw)
            epochs = search.run(watch)
            return SmallestTrigger(search.best, plain.item(), epochs)
    finally:
        model.train(training)


class _Search:
    def __init__(
        self, copy: Perturber, images: Tensor, settings: TriggerSearch, draw: torch.Generator
    ) -> None:
        self.copy, self.images, self.settings, self.draw = copy, images, settings, draw
        size = images.shape[-1]
        start = torch.rand((4, size, size), generator=draw, device=images.device)
        inverse = torch.atanh((2 * start - 1) * (1 - 1e-7))  # of what `mask` and `pattern` do
        self.free = [inverse[:1].requires_grad_(), inverse[1:].requires_grad_()]
        large = size > LARGE
        self.floor = 1e-7 if large else 1e-5
        self.patience = settings.patience * (7 if large else 2)
        self.weight, self.best = settings.weight, 1.0
        self.above = self.below = self.low = self.waited = 0

    def run(self, watch: Watch) -> int:
        """Searches until the trigger shrinks no more. How many epochs it took."""
        adam = torch.optim.Adam(self.free, betas=(0.5, 0.9))
        most = self.settings.epochs
        with watch(most, "DECREE", "epochs at most") as advance:
            for epoch in range(most):
                adam.param_groups[0]["lr"] = self.settings.rate(epoch)
                cosines = [self.step(adam, x) for x in self.batches()]
                found = sum(cosines) / len(cosines) > self.settings.cosine
                if found and self.waited > self.patience:
                    return epoch + 1
                advance(1)
        return most

    def batches(self) -> Iterator[Tensor]:
        """The images in another order; a single one at the end is left out."""
        order = torch.randperm(len(self.images), generator=self.draw, device=self.images.device)
        for rows in torch.split(order, self.settings.batch_size):
            if len(rows) > 1:
                yield self.images[rows].contiguous(memory_format=torch.channels_last)

    def step(self, adam: torch.optim.Adam, x: Tensor) -> float:
        """One step. The mean cosine before it."""
        mask, pattern = ((torch.tanh(each) + 1) / 2 for each in self.free)
        cosine = mean_cosine(self.copy.features((1 - mask) * x + mask * pattern))
        loss = self.weight * 3 * mask.sum() - cosine
        for each, gradient in zip(self.free, torch.autograd.grad(loss, self.free), strict=True):
            each.grad = gradient
        adam.step()
        self.follow(cosine.item(), mask.mean().item())
        return cosine.item()

    def follow(self, cosine: float, share: float) -> None:
        """Keeps the smallest trigger, and lets the weight of the mask follow the cosine."""
        found, patience = cosine > self.settings.cosine, self.settings.patience
        smaller = found and share < self.best
        self.best = share if smaller else self.best
        self.waited = 0 if smaller or self.best == 1 else self.waited + 1
        self.low = self.low + 1 if found and self.weight < self.floor else 0
        self.above, self.below = (self.above + 1, 0) if found else (0, self.below + 1)
        if self.low > 2 * patience:
            self.weight, self.above, self.below = self.settings.weight, 0, 0
        elif self.above > patience:
            self.weight, self.above = self.weight * self.settings.factor, 0
        elif self.below > patience and self.weight >= self.floor:
            self.weight, self.below = self.weight / self.settings.factor, 0
