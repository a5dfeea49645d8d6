"""The transformations of PhysicalBA, batched, with parameters of their own for every image.

Horizontal flip, brightness and contrast, then a small rotation, shift and shrinking with black
borders: torchvision's RandomHorizontalFlip, ColorJitter(0.2, 0.2) and RandomAffine(10, (0.1, 0.1),
(0.8, 0.9)), as in the public code of BackdoorBox. Nothing waits for the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import rgb_to_grayscale

JITTER = 0.2  # brightness and contrast factors lie within 1 - 0.2 and 1 + 0.2
DEGREES = 10.0
SHIFT = 0.1  # of the side
SCALE = (0.8, 0.9)


class Motion(NamedTuple):
    """An affine motion per image; each field is (B,), float.

    Attributes:
        angle: Clockwise, in degrees.
        right: In whole pixels.
        down: In whole pixels.
        scale: Of the content; below 1 it shrinks.
    """

    angle: Tensor
    right: Tensor
    down: Tensor
    scale: Tensor


def physical(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    """Flips, brightens, rotates, shifts and shrinks every image at random.

    Args:
        images: (B, 3, H, W), float32 in [0, 1]. Not changed.
        generator: On the device of `images`; the only source of randomness.
        flip_rate: Probability of the flip.

    Returns:
        (B, 3, H, W), in [0, 1].
    """
    batch, _, height, width = images.shape
    uniform = torch.rand(8, batch, generator=generator, device=images.device)
    mirror = uniform[0] < flip_rate
    brightness, contrast = 1 + JITTER * (2 * uniform[1] - 1), 1 + JITTER * (2 * uniform[2] - 1)
    motion = Motion(
        angle=DEGREES * (2 * uniform[4] - 1),
        right=(SHIFT * width * (2 * uniform[5] - 1)).round(),
        down=(SHIFT * height * (2 * uniform[6] - 1)).round(),
        scale=SCALE[0] + (SCALE[1] - SCALE[0]) * uniform[7],
    )
    images = torch.where(mirror[:, None, None, None], images.flip(3), images)
    images = brightness_contrast(images, brightness, contrast, uniform[3] < 0.5)
    return move(images, motion)


def brightness_contrast(
    images: Tensor, brightness: Tensor, contrast: Tensor, brightness_first: Tensor
) -> Tensor:
    """Brightness and contrast as torchvision's ColorJitter, each image in its own order.

    Args:
        images: (B, 3, H, W), in [0, 1].
        brightness: Factors, (B,).
        contrast: Factors, (B,).
        brightness_first: (B,), bool.

    Returns:
        (B, 3, H, W), in [0, 1].
    """
    one = torch.ones_like(brightness)
    early = torch.where(brightness_first, brightness, one)
    late = torch.where(brightness_first, one, brightness)
    images = (images * early[:, None, None, None]).clamp(0, 1)
    level = rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    factor = contrast[:, None, None, None]
    images = (factor * images + (1 - factor) * level).clamp(0, 1)
    return (images * late[:, None, None, None]).clamp(0, 1)


def move(images: Tensor, motion: Motion) -> Tensor:
    """Rotates about the centre, scales and shifts; nearest neighbour, black outside.

    Equal to torchvision's `affine` but for pixels whose source lies midway between two.

    Args:
        images: (B, 3, H, W).
        motion: One per image.

    Returns:
        (B, 3, H, W).
    """
    height, width = images.shape[-2:]
    radians = motion.angle * (math.pi / 180)
    cosine, sine = (f(radians)[:, None, None] for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    # where in the source an output pixel comes from: undo the shift, the rotation, the scale
    back_y = y[None, :, None] - motion.down[:, None, None]
    back_x = x[None, None, :] - motion.right[:, None, None]
    scale = motion.scale[:, None, None]
    source_x = (cosine * back_x + sine * back_y) / scale
    source_y = (cosine * back_y - sine * back_x) / scale
    grid = torch.stack([source_x / (width / 2), source_y / (height / 2)], dim=-1)
    return functional.grid_sample(images, grid, mode="nearest", align_corners=False)
