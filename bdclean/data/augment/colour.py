"""Colour changes with parameters of its own for every image, batched on the device."""

import torch
from torch import Tensor

JITTER_RATE = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
UNCHANGED = (1.0, 1.0, 1.0, 0.0)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # places in the two tuples above
TINY = 1e-12  # keeps 0 / 0 out of the hue of gray pixels
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of R, G, B


def draw_factors(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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
    jittered = torch.rand(batch, generator=generator, device=device) < JITTER_RATE
    factors *= jittered[:, None]
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
        factors: (B, 4), as from `draw_factors`.
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
