"""Crops and flips with a window of its own for every image, batched on the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4  # pixels on each side, before a window of the old size is cut
SCALE = (0.2, 1.0)  # share of the area that a resized crop keeps
RATIO = (3 / 4, 4 / 3)  # width / height of a resized crop
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
# weights of the nearest pixels as polynomials in the distance to the one before the centre
CATMULL_ROM = ((0, -0.5, 1, -0.5), (1, 0, -2.5, 1.5), (0, 0.5, 2, -1.5), (0, 0, -0.5, 0.5))
LINEAR = ((1, -1), (0, 1))

Kernel = tuple[tuple[float, ...], ...]


class Boxes(NamedTuple):
    """One crop window per image, in pixels; each field is (B,), int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def pad_crop(
    images: Tensor, top: Tensor, left: Tensor, mirror: Tensor, padding: int = PADDING
) -> Tensor:
    """Pads by zeros, cuts a window of the old size and mirrors it where asked.

    Pixels are copied, so the result is bit-equal to torchvision's pad, crop and hflip.

    Args:
        images: (B, 3, H, W).
        top: (B,), first row of the window in the padded image, 0 to 2 `padding`.
        left: (B,), first column, likewise.
        mirror: (B,), bool, whether to flip left and right.
        padding: Pixels on each side.

    Returns:
        (B, 3, H, W).
    """
    batch, channels, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + _columns(width, mirror)
    index = (rows * padded.shape[3])[:, :, None] + columns[:, None, :]
    index = index.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)


def _columns(width: int, mirror: Tensor) -> Tensor:
    """(B, W): 0 to W - 1, backwards where `mirror` is set."""
    forward = torch.arange(width, device=mirror.device)
    return torch.where(mirror[:, None], forward.flip(0), forward)


def draw_boxes(
    batch: int,
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float] = SCALE,
) -> Boxes:
    """Draws crop windows as torchvision's `RandomResizedCrop.get_params`, all images at once.

    Every image makes `CROP_ATTEMPTS` draws and takes its first that fits, else the largest
    centred window of an allowed ratio; so the count of random numbers is always the same.

    Args:
        batch: Images, B.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        generator: Its device is that of the result.
        scale: Least and largest share of the area.

    Returns:
        Windows inside the image, area within `scale` and ratio within `RATIO` up to rounding.
    """
    shape, device = (batch, CROP_ATTEMPTS), generator.device
    area = torch.empty(shape, device=device).uniform_(*scale, generator=generator)
    area.mul_(height * width)
    ratio = torch.empty(shape, device=device)
    ratio.uniform_(math.log(RATIO[0]), math.log(RATIO[1]), generator=generator).exp_()
    widths = (area * ratio).sqrt().round()
    heights = (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    fit = fits.gather(1, first)[:, 0]
    widest, highest = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    box_width = torch.where(fit, widths.gather(1, first)[:, 0], widest)
    box_height = torch.where(fit, heights.gather(1, first)[:, 0], highest)
    corner = torch.rand(2, batch, generator=generator, device=device)
    top = torch.where(fit, _integer_below(corner[0], height - box_height), (height - highest) // 2)
    left = torch.where(fit, _integer_below(corner[1], width - box_width), (width - widest) // 2)
    return Boxes(top.long(), left.long(), box_height.long(), box_width.long())


def _integer_below(uniform: Tensor, last: Tensor) -> Tensor:
    # float32 rounds u * (last + 1) up to last + 1 for the largest u < 1
    return (uniform * (last + 1)).floor().minimum(last)


def resized_crop(
    images: Tensor, boxes: Boxes, mirror: Tensor, kernel: Kernel = CATMULL_ROM
) -> Tensor:
    """Cuts a window per image, resizes it to (H, W) and mirrors it where asked.

    Equal to torchvision's `resized_crop` (antialias) and `hflip` up to float32 rounding:
    the resize is separable, so it is one small matrix per image and axis, `R_y @ image @ R_x.T`.
    Clamped to [0, 1], because bicubic interpolation overshoots.

    Args:
        images: (B, 3, H, W).
        boxes: Windows inside the image.
        mirror: (B,), bool, whether to flip left and right.
        kernel: `CATMULL_ROM` (bicubic) or `LINEAR` (bilinear).

    Returns:
        (B, 3, H, W), in [0, 1].
    """
    height, width = images.shape[-2:]
    upright = torch.zeros_like(mirror)
    rows = _interpolation(boxes.top, boxes.height, height, upright, kernel)
    columns = _interpolation(boxes.left, boxes.width, width, mirror, kernel)
    wide = torch.bmm(images.flatten(1, 2), columns.mT).view_as(images)
    # per colour plane: a broadcast matmul would first write out a copy of `rows` for each plane
    planes = [torch.bmm(rows, plane) for plane in wide.unbind(1)]
    return torch.stack(planes, 1).clamp_(0, 1)


def _interpolation(
    start: Tensor, length: Tensor, size: int, mirror: Tensor, kernel: Kernel
) -> Tensor:
    """(B, size, size): row o holds the weights of the pixels that output o reads.

    A window is never larger than its output, so the antialiasing filter has its plain width of
    four taps (Catmull-Rom, a = -1/2, as Pillow and torch) or two (linear). Taps outside the
    window get no weight and the rest is normalised, again as they do.
    """
    scale = (length / size)[:, None]
    centre = (_columns(size, mirror) + 0.5) * scale - 0.5
    base = centre.floor()
    t = centre - base
    weights = torch.stack([_polynomial(tap, t) for tap in kernel], -1)
    first = 1 - len(kernel) // 2
    offsets = torch.arange(first, first + len(kernel), device=base.device)
    taps = base.long()[..., None] + offsets
    weights = weights * ((taps >= 0) & (taps < length[:, None, None]))
    weights = weights / weights.sum(-1, keepdim=True)
    # two spare columns on each side take the taps that fall off the image: no index twice
    matrix = weights.new_zeros(len(start), size, size + 4)
    return matrix.scatter_(2, taps + start[:, None, None] + 2, weights)[..., 2:-2]


def _polynomial(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    value = coefficients[-1] * t + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * t + coefficient
    return value
