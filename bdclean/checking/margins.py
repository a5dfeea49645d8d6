"""MM-BD: is the largest margin of one class out of line? Needs no image at all.

Wang, Xiang, Miller, Kesidis: MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
Backdoor Pattern Types Using a Maximum Margin Statistic, IEEE S&P 2024 (arXiv:2205.06900). For each
class c, by gradient ascent from uniform noise,

    r_c = max over x in [0, 1] of z_c(x) - max over j != c of z_j(x)

A Gamma distribution is fitted to all r_c but the largest, r_t. With F its distribution function,
p = 1 - F(r_t)^K is the chance that the largest of K clean values exceeds r_t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from scipy import stats
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.errors import ConfigError
from bdclean.functional.families import LEAST_CLASSES
from bdclean.functional.precision import fast_format, full_float32
from bdclean.functional.seeds import derive_seed
from bdclean.progress import Watch, unwatched


@dataclass(frozen=True)
class MarginTest:
    """Settings of the ascent; defaults are those of the authors' code.

    Attributes:
        starts: Points of noise that each class starts from.
        steps: Of the ascent, at most.
        lr: Of its SGD.
        momentum: Of its SGD.
        tolerance: Relative change of the sum of margins below which the ascent of a class ends.
    """

    starts: int = 30
    steps: int = 300
    lr: float = 0.01
    momentum: float = 0.2
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Margins:
    """Result of the test.

    Attributes:
        largest: r_c of each class, (K,).
        p: Probability of the largest one on a clean network, by the test's own model.
        target: Its class.
        z: Its distance from the median of the others in 1.4826 median absolute deviations.
    """

    largest: tuple[float, ...]
    p: float
    target: int
    z: float


def maximum_margins(
    model: SplitModel,
    settings: MarginTest = MarginTest(),
    seed: int = 0,
    watch: Watch = unwatched,
) -> Margins:
    """Runs the test.

    Args:
        model: A classifier of at least 6 classes; left as it is.
        settings: Of the ascent.
        seed: Of the noise.
        watch: Shows how far it is.

    Raises:
        ConfigError: If it has fewer classes.
    """
    head, count = model.require_head(), model.info.num_classes or 0
    if count < LEAST_CLASSES:
        raise ConfigError(
            f"MM-BD compares one class with the others, and {count} classes are too few; it needs "
            f"{LEAST_CLASSES}."
        )
    device, training = next(model.parameters()).device, model.training
    size = (settings.starts, 3, model.info.input_size, model.info.input_size)
    model.eval()
    largest = []
    with fast_format(device.type), perturb_precision(device.type) as dtype:
        copy = Perturber(model, "eval", dtype)
        with watch(count, "MM-BD", "classes") as advance:
            for k in range(count):
                draw = torch.Generator(device).manual_seed(derive_seed("mm-bd", seed, k))
                noise = torch.rand(size, generator=draw, device=device)
                x = noise.contiguous(memory_format=torch.channels_last)
                x = _ascend(lambda x: head(copy.features(x).float()).float(), x, k, settings)
                with torch.no_grad(), full_float32(device.type):
                    largest.append(_margin(model(x), k).max().item())
                advance(1)
    model.train(training)
    return judge(largest)


def _ascend(predict: Callable[[Tensor], Tensor], x: Tensor, k: int, settings: MarginTest) -> Tensor:
    velocity, before = torch.zeros_like(x), None
    for _ in range(settings.steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            margin = _margin(predict(x), k)
            (gradient,) = torch.autograd.grad(margin.sum(), x)
        now = margin.sum().item()
        if before is not None and abs(now - before) < settings.tolerance * abs(before):
            break
        before = now
        velocity = settings.momentum * velocity + gradient
        x = (x.detach() + settings.lr * velocity).clamp(0, 1)
    return x.detach()


def _margin(logits: Tensor, k: int) -> Tensor:
    rest = torch.arange(logits.shape[1], device=logits.device) != k
    return logits[:, k] - logits[:, rest].amax(1)


def judge(largest: list[float]) -> Margins:
    """The p-value of the largest of K margins.

    Args:
        largest: r_c of each class.
    """
    target = max(range(len(largest)), key=largest.__getitem__)
    null = [r for k, r in enumerate(largest) if k != target]
    shape, location, scale = stats.gamma.fit(null)
    below = float(stats.gamma.cdf(largest[target], shape, location, scale))
    middle = median(null)
    spread = 1.4826 * median(abs(r - middle) for r in null)
    z = (largest[target] - middle) / spread if spread else 0.0
    return Margins(tuple(largest), 1 - below ** len(largest), target, z)
