"""The augmentations by name, with parameters of their own for every image of a batch.

Semantics are those of `torchvision.transforms` on float tensors (bicubic with antialiasing, exact
HSV hue); only the loop over images is gone. Nothing waits for the device, and all random numbers
come from the generator that is passed in.

A new augmentation is a function, an entry of `RECIPES`, and its name in
`bdclean.types.AugmentationName`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.data.augment.blur import random_blur
from bdclean.data.augment.colour import blend_, color_jitter_, draw_factors
from bdclean.data.augment.geometry import LINEAR, PADDING, draw_boxes, pad_crop, resized_crop
from bdclean.data.augment.physical import physical
from bdclean.errors import ConfigError, DataError
from bdclean.functional.rotation import rotate
from bdclean.types import AugmentationName

FLIP_RATE = 0.5
GRAY_RATE = 0.2
IMAGENET_SCALE = (0.08, 1.0)  # share of the area that a crop keeps, torchvision's default
WANET_PADDING = 5  # WaNet's public code, as the three numbers below
WANET_CROP_RATE = 0.8
WANET_DEGREES = 10.0
WANET_ROTATION_RATE = 0.5

Change = Callable[[Tensor, torch.Generator, float], Tensor]
"""Float images (B, 3, H, W), a generator on their device and the probability of a horizontal flip
give new images; the draws do not depend on that probability."""


@dataclass(frozen=True)
class Augmentation:
    """How images of one name are augmented.

    Attributes:
        change: What is done to a batch; None leaves it as stored.
        flips: Whether `change` mirrors images, unless the data set forbids it.
        blurs: Whether a random Gaussian blur follows (`bdclean.data.augment.blur`), unless it
            would destroy the attack's trigger.
    """

    change: Change | None
    flips: bool = False
    blurs: bool = False


def shifted(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    """A random crop after padding 4 zeros on each side, and a flip."""
    device, batch = images.device, len(images)
    offsets = torch.randint(0, 2 * PADDING + 1, (2, batch), generator=generator, device=device)
    mirror = _chance(batch, flip_rate, generator)
    return pad_crop(images, offsets[0], offsets[1], mirror)


def simclr(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    """The views of SimCLR without blur (Chen et al., ICML 2020, appendix B.9: CIFAR-10).

    Random resized crop (area 0.2 to 1, ratio 3/4 to 4/3, bicubic), flip, colour jitter (0.4, 0.4,
    0.4, 0.1) with probability 0.8 in an order drawn per image, grayscale with probability 0.2.
    """
    batch, _, height, width = images.shape
    boxes = draw_boxes(batch, height, width, generator)
    mirror = _chance(batch, flip_rate, generator)
    factors, order = draw_factors(batch, generator)
    gray = _chance(batch, GRAY_RATE, generator).float()
    images = color_jitter_(resized_crop(images, boxes, mirror), factors, order)
    return blend_(images, keep=1 - gray, gray=gray, mean=torch.zeros_like(gray))


def imagenet(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    """Torchvision's RandomResizedCrop (area 0.08 to 1, ratio 3/4 to 4/3, bilinear), and a flip."""
    batch, _, height, width = images.shape
    boxes = draw_boxes(batch, height, width, generator, IMAGENET_SCALE)
    mirror = _chance(batch, flip_rate, generator)
    return resized_crop(images, boxes, mirror, LINEAR)


def wanet(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
    """The training of WaNet's public code.

    Crop after padding 5 with probability 0.8, rotation by up to 10 degrees with probability 0.5,
    and a flip.
    """
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


def _chance(batch: int, rate: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator, device=generator.device) < rate


RECIPES: dict[AugmentationName, Augmentation] = {
    "none": Augmentation(None),
    "crop": Augmentation(shifted),
    "weak": Augmentation(shifted, flips=True),
    "simclr": Augmentation(simclr, flips=True),
    "simclr_blur": Augmentation(simclr, flips=True, blurs=True),
    "imagenet": Augmentation(imagenet, flips=True),
    "wanet": Augmentation(wanet, flips=True),
    "physical": Augmentation(physical, flips=True),
}
"""All augmentations. "weak" without flips draws and gives the same as "crop"."""


def named(name: AugmentationName) -> Augmentation:
    """The augmentation of that name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"augmentation={name}: it must be one of {', '.join(RECIPES)}.")
    return RECIPES[name]


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
        name: Of an entry of `RECIPES`, whose function says what it does.
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
    chosen = named(name)
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise DataError(
            "Augmentation needs float images of shape (B, 3, H, W) in [0, 1], "
            f"not {images.dtype} of shape {tuple(images.shape)}."
        )
    if chosen.change is None or len(images) == 0:
        return images.float()
    channels_last = not images.is_contiguous() and images.is_contiguous(
        memory_format=torch.channels_last
    )
    planes = images.float().contiguous()  # everything below runs over whole colour planes
    flip_rate = FLIP_RATE if flip and chosen.flips else 0.0
    with torch.autocast(images.device.type, enabled=False):  # no bf16 interpolation in hot loops
        result = chosen.change(planes, generator, flip_rate)
        if chosen.blurs:
            result = random_blur(result, generator, wanted=blur)
    return result.contiguous(memory_format=torch.channels_last) if channels_last else result
