"""Adversarial perturbation by projected gradient ascent (PGD; Madry et al., ICLR 2018)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdclean.checks import check_choice
from bdclean.errors import ConfigError

StepUnit = Literal["relative", "pixel255", "unit"]
"""What a step size means: a share of the radius, 8-bit pixel values, or the [0, 1] range."""

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class PGD:
    """Settings of the ascent. Radius and steps have no default: they are a method's, by its paper.

    Attributes:
        epsilon: Radius of the ball in 8-bit pixel values (8 means 8/255), for both norms.
        steps: Number of gradient steps, at least 1.
        step_size: Length of a step in `step_unit`, above 0. In the L-infinity ball every pixel
            moves by it, in the L2 ball the whole image does.
        step_unit: `relative` (times the radius), `pixel255` (divided by 255) or `unit` (as is).
            The text of CBD gives 0.1 without a unit; `relative` is the one reading under which
            every radius of its tables is reached in 20 steps.
        norm: `linf` or `l2`.
        random_start: Start at a point drawn uniformly from the ball instead of at the image.

    Raises:
        ConfigError: A value is out of its range.
    """

    epsilon: float
    steps: int
    step_size: float = 0.1
    step_unit: StepUnit = "relative"
    norm: Norm = "linf"
    random_start: bool = True

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)):
            raise ConfigError(f"epsilon={self.epsilon}: it must be 0 or above, in 8-bit values.")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: it must be at least 1.")
        if not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ConfigError(f"step_size={self.step_size}: it must be above 0.")
        check_choice("step_unit", self.step_unit, StepUnit)
        check_choice("norm", self.norm, Norm)

    @property
    def radius(self) -> float:
        """Radius of the ball for images in [0, 1]."""
        return self.epsilon / 255

    @property
    def step(self) -> float:
        """Length of a step for images in [0, 1]."""
        scale = {"relative": self.radius, "pixel255": 1 / 255, "unit": 1.0}[self.step_unit]
        return self.step_size * scale


def pgd(
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    config: PGD,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Seeks images inside the ball around `images`, and inside [0, 1], that maximise `loss`.

    Every step takes one forward and one backward pass down to the images only: no gradient of
    a parameter is computed or stored. The mode of the network (BatchNorm and dropout in eval)
    is the caller's. It cannot run in inference mode.

    Args:
        images: (B, C, H, W), floating type, in [0, 1]; left as they are.
        loss: Maps images (B, C, H, W) to a scalar. It may couple the images of the batch.
        config: Radius, steps, norm.
        generator: Source of the random start, on the device of the images; None: torch's own.

    Returns:
        The images after the last step, (B, C, H, W), detached.
    """
    images = images.detach()
    if config.radius == 0:
        return images.clone()
    start = _random_start(images, config, generator) if config.random_start else images
    project = _projection(images, config)
    adversarial = project(start)
    for _ in range(config.steps):
        # A new leaf in every step, so that no graph outlives it.
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(adversarial), adversarial)
        direction = gradient.sign() if config.norm == "linf" else _unit_length(gradient)
        adversarial = project(adversarial.detach() + config.step * direction)
    return adversarial


def _random_start(images: Tensor, config: PGD, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty_like(images)
    if config.norm == "linf":
        return images + noise.uniform_(-config.radius, config.radius, generator=generator)
    direction = _unit_length(noise.normal_(generator=generator))
    uniform = torch.rand(
        (len(images), 1, 1, 1), generator=generator, device=images.device, dtype=images.dtype
    )
    # The share of a ball's volume within distance r grows as r to the number of dimensions.
    return images + direction * (config.radius * uniform.pow(1 / images[0].numel()))


def _projection(images: Tensor, config: PGD) -> Callable[[Tensor], Tensor]:
    """Clips to the ball, then to the box; as the images are in the box, it stays in the ball."""
    if config.norm == "linf":
        lower, upper = (images - config.radius).clamp_min(0), (images + config.radius).clamp_max(1)
        return lambda moved: moved.clamp(lower, upper)

    def project(moved: Tensor) -> Tensor:
        delta = moved - images
        length: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return (images + delta / (length / config.radius).clamp_min(1)).clamp(0, 1)

    return project


def _unit_length(x: Tensor) -> Tensor:
    """Scales every image to L2 length 1; an image of zeros stays zero."""
    tiny = torch.finfo(x.dtype).tiny
    # First by the largest entry: squares of very small gradients vanish in float32.
    x = x / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return x / length.clamp_min(tiny)
