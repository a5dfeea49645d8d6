"""Gaussian blur with a strength of its own for every image, batched on the device."""

import torch
from torch import Tensor
from torch.nn import functional

BLUR_RATE = 0.5  # as the two below: SimCLR (Chen et al., ICML 2020), appendix A
SIGMA = (0.1, 2.0)  # pixels
KERNEL_SHARE = 0.1  # kernel size as a share of the side


def random_blur(images: Tensor, generator: torch.Generator, *, wanted: bool = True) -> Tensor:
    """Blurs with probability `BLUR_RATE`, with sigma uniform in `SIGMA`, drawn for every image.

    Args:
        images: (B, 3, H, W), float.
        generator: On the device of `images`.
        wanted: False draws the same numbers and blurs nothing.

    Returns:
        (B, 3, H, W).
    """
    sigma = draw_sigma(len(images), generator)
    size = kernel_size(min(images.shape[-2:]))
    return gaussian_blur(images, sigma, size) if wanted else images


def draw_sigma(batch: int, generator: torch.Generator) -> Tensor:
    """Draws the strength of each image.

    Args:
        batch: Images, B.
        generator: Its device is that of the result.

    Returns:
        (B,), uniform in `SIGMA` with probability `BLUR_RATE`, else 0: no blur.
    """
    device = generator.device
    sigma = torch.empty(batch, device=device).uniform_(*SIGMA, generator=generator)
    return sigma * (torch.rand(batch, generator=generator, device=device) < BLUR_RATE)


def kernel_size(side: int) -> int:
    """The odd number of pixels next to a tenth of the side: 3 of 32, 23 of 224."""
    return 2 * round((KERNEL_SHARE * side - 1) / 2) + 1 if side > 10 else 1


def gaussian_blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Blurs every image, as torchvision's `gaussian_blur` with the same kernel size and sigma.

    Args:
        images: (B, 3, H, W), float.
        sigma: (B,), in pixels; 0 leaves the image as it is.
        size: Of the kernel, odd and below 2 min(H, W).

    Returns:
        (B, 3, H, W); the border is reflected.
    """
    batch, channels, height, width = images.shape
    half = size // 2
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # 0 gives a peak
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = images.reshape(1, batch * channels, height, width)
    planes = functional.pad(planes, [half] * 4, mode="reflect")
    groups = batch * channels
    planes = functional.conv2d(planes, weights.view(groups, 1, size, 1), groups=groups)
    planes = functional.conv2d(planes, weights.view(groups, 1, 1, size), groups=groups)
    return planes.view_as(images)
