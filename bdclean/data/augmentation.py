"""Batched augmentation on the device, with parameters of its own for every image.

Semantics are those of `torchvision.transforms` on float tensors (bicubic with antialiasing, exact
HSV hue); only the loop over images is gone. There is no loop over images, nothing waits for the
device, and all random numbers come from the generator that is passed in.
"""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from bdclean.data.blur import random_blur
from bdclean.data.physical import physical
from bdclean.errors import ConfigError, DataError
from bdclean.functional.rotation import rotate
from bdclean.types import AugmentationName

PADDING = 4  # pixels on each side, before "crop" and "weak" cut
SCALE = (0.2, 1.0)  # share of the area that a resized crop keeps
IMAGENET_SCALE = (0.08, 1.0)  # likewise, torchvision's default
RATIO = (3 / 4, 4 / 3)  # width / height of a resized crop
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
FLIP_RATE = 0.5
FLIPPING = frozenset({"weak", "simclr", "simclr_blur", "imagenet", "wanet", "physical"})
BLURRING = frozenset({"simclr_blur"})
JITTER_RATE = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
GRAY_RATE = 0.2
WANET_PADDING = 5  # WaNet's public code, as the three numbers below
WANET_CROP_RATE = 0.8
WANET_DEGREES = 10.0
WANET_ROTATION_RATE = 0.5
UNCHANGED = (1.0, 1.0, 1.0, 0.0)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # places in the two tuples above
TINY = 1e-12  # keeps 0 / 0 out of the hue of gray pixels
# weights of the nearest pixels as polynomials in the distance to the one before the centre
CATMULL_ROM = ((0, -0.5, 1, -0.5), (1, 0, -2.5, 1.5), (0, 0.5, 2, -1.5), (0, 0, -0.5, 0.5))
LINEAR = ((1, -1), (0, 1))
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of R, G, B

Kernel = tuple[tuple[float, ...], ...]


class Boxes(NamedTuple):
    """One crop window per image, in pixels; each field is (B,), int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


@torch.no_grad()
def augment(
    name: AugmentationName,
    images: Tensor,
    generator: torch.Generator,
    *,
    flip: bool = True,
    blur: bool = True,
) -> Tensor:
    """Augments every image with random parameters of its own.

    Args:
        name: "none": unchanged. "crop": random crop after padding 4 zeros on each side. "weak":
            the same, and a horizontal flip with probability 1/2. "simclr": random resized crop
            (area 0.2-1, ratio 3/4-4/3, bicubic), flip 1/2, colour jitter (0.4, 0.4, 0.4, 0.1)
            with probability 0.8 in an order drawn per image, grayscale with probability 0.2, no
            blur (Chen et al., ICML 2020, the CIFAR-10 setting of appendix B.9). "simclr_blur":
            then Gaussian blur with probability 1/2 (see `bdclean.data.blur`). "imagenet":
            torchvision's RandomResizedCrop (area 0.08-1, ratio 3/4-4/3, bilinear) and flip 1/2.
            "wanet": crop after padding 5 with probability 0.8, rotation by up to 10 degrees with
            probability 0.5, flip 1/2 (WaNet's public code). "physical": `bdclean.data.physical`.
        images: (B, 3, H, W), float, in [0, 1]. Not changed.
        generator: On the device of `images`; the only source of randomness.
        flip: False leaves out the horizontal flips and draws all else the same: "weak" is then
            "crop".
        blur: False leaves out the blur, likewise: "simclr_blur" is then "simclr".

    Returns:
        (B, 3, H, W), float32 in [0, 1], channels_last if `images` are.

    Raises:
        ConfigError: Unknown name.
        DataError: `images` are not a batch of float RGB images.
    """
    if name not in get_args(AugmentationName):
        allowed = ", ".join(get_args(AugmentationName))
        raise ConfigError(f"augmentation = {name!r} is unknown; allowed: {allowed}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise DataError(
            f"augmentation needs float images of shape (B, 3, H, W) in [0, 1], "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    if name == "none" or len(images) == 0:
        return images.float()
    channels_last = not images.is_contiguous() and images.is_contiguous(
        memory_format=torch.channels_last
    )
    planes = images.float().contiguous()  # everything below runs over whole colour planes
    flip_rate = FLIP_RATE if flip and name in FLIPPING else 0.0
    with torch.autocast(images.device.type, enabled=False):  # no bf16 interpolation in hot loops
        if name in ("simclr", "simclr_blur"):
            result = _simclr(planes, generator, flip_rate)
            if name in BLURRING:
                result = random_blur(result, generator, wanted=blur)
        elif name == "imagenet":
            result = _imagenet(planes, generator, flip_rate)
        elif name == "wanet":
            result = _wanet(planes, generator, flip_rate)
        elif name == "physical":
            result = physical(planes, generator, flip_rate)
        else:
            result = _pad_crop(planes, generator, flip_rate)
    return result.contiguous(memory_format=torch.channels_last) if channels_last else result


def _pad_crop(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    device, batch = images.device, len(images)
    offsets = torch.randint(0, 2 * PADDING + 1, (2, batch), generator=generator, device=device)
    mirror = _chance(batch, flip_rate, generator)
    return pad_crop(images, offsets[0], offsets[1], mirror)


def _wanet(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    device, batch = images.device, len(images)
    last = 2 * WANET_PADDING
    offsets = torch.randint(0, last + 1, (2, batch), generator=generator, device=device)
    crop = _chance(batch, WANET_CROP_RATE, generator)
    offsets = torch.where(crop, offsets, WANET_PADDING)  # else the image's own window
    degrees = torch.empty(batch, device=device)
    degrees.uniform_(-WANET_DEGREES, WANET_DEGREES, generator=generator)
    degrees *= _chance(batch, WANET_ROTATION_RATE, generator)
    mirror = _chance(batch, flip_rate, generator)
    # the public code flips last; angles are symmetric, so the order makes no difference
    return rotate(pad_crop(images, offsets[0], offsets[1], mirror, WANET_PADDING), degrees)


def _imagenet(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    batch, _, height, width = images.shape
    boxes = draw_boxes(batch, height, width, generator, IMAGENET_SCALE)
    mirror = _chance(batch, flip_rate, generator)
    return resized_crop(images, boxes, mirror, LINEAR)


def _simclr(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    batch, _, height, width = images.shape
    boxes = draw_boxes(batch, height, width, generator)
    mirror = _chance(batch, flip_rate, generator)
    factors, order = draw_jitter(batch, generator)
    gray = _chance(batch, GRAY_RATE, generator).float()
    images = color_jitter_(resized_crop(images, boxes, mirror), factors, order)
    return blend_(images, keep=1 - gray, gray=gray, mean=torch.zeros_like(gray))


def _chance(batch: int, rate: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator, device=generator.device) < rate


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


def draw_jitter(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a colour jitter per image.

    Args:
        batch: Images, B.
        generator: Its device is that of the result.

    Returns:
        (B, 4) factors: brightness, contrast, saturation (1 = unchanged), and hue in turns of the
        colour circle (0 = unchanged); unchanged altogether with probability 1 - `JITTER_RATE`.
        (B, 4), int64: row b is the order in which image b sees them, a uniform permutation.
    """
    device = generator.device
    factors = torch.empty(batch, 4, device=device).uniform_(-1, 1, generator=generator)
    factors *= _chance(batch, JITTER_RATE, generator)[:, None]
    for op, (strength, unchanged) in enumerate(zip(JITTER, UNCHANGED, strict=True)):
        factors[:, op].mul_(strength).add_(unchanged)
    order = torch.rand(batch, 4, generator=generator, device=device).argsort(1)
    return factors, order


def color_jitter_(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order, in place.

    The first three are the same affine operation (`blend_`) with other weights, so one call
    serves a batch in which every image is at another of them. The hue shift is dear, so all
    images share one call: three affine steps lie before it and three after it, and an image
    leaves out (weights of the identity) those on the wrong side of its own hue step.

    Args:
        images: (B, 3, H, W), in [0, 1]. Overwritten.
        factors: (B, 4), as from `draw_jitter`.
        order: (B, 4), likewise.

    Returns:
        `images`.
    """
    hue_step = (order == HUE).int().argmax(1, keepdim=True)
    step = torch.arange(4, device=order.device)
    mine = torch.stack((step < hue_step, step > hue_step))  # (2, B, 4): before and after the hue
    keep = torch.where(mine, factors.gather(1, order), 1)
    gray = (1 - keep) * (order == SATURATION)
    mean = (1 - keep) * (order == CONTRAST)
    for s in range(3):
        blend_(images, keep[0, :, s], gray[0, :, s], mean[0, :, s])
    shift_hue_(images, factors[:, HUE])
    for s in range(1, 4):
        blend_(images, keep[1, :, s], gray[1, :, s], mean[1, :, s])
    return images


def blend_(images: Tensor, keep: Tensor, gray: Tensor, mean: Tensor) -> Tensor:
    """`clamp(keep * image + gray * luma + mean * average of luma)`, weights per image, in place.

    torchvision's brightness is (f, 0, 0), contrast (f, 0, 1 - f), saturation (f, 1 - f, 0),
    grayscale (0, 1, 0).

    Args:
        images: (B, 3, H, W), in [0, 1]. Overwritten.
        keep: (B,).
        gray: (B,).
        mean: (B,).

    Returns:
        `images`.
    """
    luma = images[:, 0:1] * LUMA[0]
    luma.add_(images[:, 1:2], alpha=LUMA[1]).add_(images[:, 2:3], alpha=LUMA[2])
    level = luma.mean((1, 2, 3)) * mean
    rest = luma.mul_(gray[:, None, None, None]).add_(level[:, None, None, None])
    return torch.addcmul(rest, images, keep[:, None, None, None], out=images).clamp_(0, 1)


def shift_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue in place, as torchvision's `adjust_hue` (HSV) up to float32 rounding.

    With h in sixths of a turn and w(m) = clamp(|h - m| - 1, 0, 1), HSV to RGB is
    `low + span * w(3)` for red, `high - span * w(2)` for green, `high - span * w(4)` for blue.

    Args:
        images: (B, 3, H, W), in [0, 1]. Overwritten.
        turns: (B,), share of a full turn.

    Returns:
        `images`.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    span = high - low
    # masks as floats, written as such: lerp by 0 or 1 is an exact choice, and on CPU five times
    # as fast as bool masks and where
    mask = torch.empty_like(high)
    hue = (red - green).add_(span, alpha=4)
    hue.lerp_((blue - red).add_(span, alpha=2), torch.eq(green, high, out=mask))
    hue.lerp_(green - blue, torch.eq(red, high, out=mask))
    hue.div_(span.clamp(min=TINY)).add_(6 * turns[:, None, None])
    hue.sub_(torch.div(hue, 6, out=mask).floor_(), alpha=6)
    for channel, (middle, start, sign) in enumerate(((3, low, 1), (2, high, -1), (4, high, -1))):
        ramp = torch.sub(hue, middle, out=mask).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(start, span, ramp, value=sign, out=images[:, channel])
    return images
