"""Batched rotation on the device, with an angle of its own for every image."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates images about their centres, counter-clockwise, as torchvision's `rotate`.

    Nearest pixel; what comes from outside is 0. An angle of 0 copies the image.

    Args:
        images: (B, 3, H, W), float.
        degrees: (B,).

    Returns:
        (B, 3, H, W).
    """
    height, width = images.shape[-2:]
    cos, sin, zero = (
        f(degrees * (math.pi / 180)) for f in (torch.cos, torch.sin, torch.zeros_like)
    )
    # where an output pixel reads; coordinates are halves of width and height, hence the ratios
    column = torch.stack((cos, -sin * (height / width), zero), -1)
    row = torch.stack((sin * (width / height), cos, zero), -1)
    shape = list(images.shape)
    grid = functional.affine_grid(torch.stack((column, row), 1), shape, align_corners=False)
    return functional.grid_sample(images, grid, mode="nearest", align_corners=False)
