"""The augmentation of WaNet against torchvision, image by image."""

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor

from bdclean.data.augment import augment
from bdclean.functional.rotation import rotate


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(batch: int, height: int = 32, width: int = 32) -> Tensor:
    """Every pixel has a value of its own, above 0, so that nothing is right by chance."""
    values = torch.randperm(batch * 3 * height * width, generator=_generator(1)) + 1
    return (values / (len(values) + 1)).view(batch, 3, height, width)


def _share_of_pixels_that_differ(images: Tensor, others: Tensor) -> float:
    return (images != others).any(1).float().mean().item()


@pytest.mark.parametrize("flips", [True, False])
def test_wanet_composes_crop_flip_and_rotation_with_parameters_per_image(flips: bool) -> None:
    images = _images(64)
    result = augment("wanet", images, _generator(9), flip=flips)
    g = _generator(9)
    offsets = torch.randint(0, 11, (2, 64), generator=g)
    crop = torch.rand(64, generator=g) < 0.8
    degrees = torch.empty(64).uniform_(-10, 10, generator=g)
    turn = torch.rand(64, generator=g) < 0.5
    flip = torch.rand(64, generator=g) < (0.5 if flips else 0)
    expected = []
    for i, image in enumerate(images):
        if crop[i]:
            image = tv.crop(tv.pad(image, [5]), int(offsets[0, i]), int(offsets[1, i]), 32, 32)
        if flip[i]:
            image = tv.hflip(image)
        if turn[i]:
            image = tv.rotate(image, degrees[i].item())
        expected.append(image)
    assert _share_of_pixels_that_differ(result, torch.stack(expected)) < 1e-3
    untouched = ~crop & ~turn & ~flip
    assert untouched.any()
    assert torch.equal(result[untouched], images[untouched])


def test_rates_of_crop_rotation_and_flip() -> None:
    images = _images(1, 12, 12).expand(3000, -1, -1, -1)
    result = augment("wanet", images, _generator())
    plain = images[0]
    same = (result == plain).flatten(1).all(1)
    mirrored = (result == plain.flip(2)).flatten(1).all(1)
    # untouched: (no crop, or the middle one of 121) and (no rotation, or one that moves no pixel)
    angles = torch.linspace(-10, 10, 401)
    few = (rotate(images[:401], angles) == plain).flatten(1).all(1).float().mean().item()
    upright = (0.2 + 0.8 / 121) * (0.5 + 0.5 * few)
    assert same.float().mean().item() == pytest.approx(upright / 2, abs=0.015)
    assert mirrored.float().mean().item() == pytest.approx(upright / 2, abs=0.015)
    quiet = augment("wanet", images, _generator(), flip=False)
    same = (quiet == plain).flatten(1).all(1)
    assert same.float().mean().item() == pytest.approx(upright, abs=0.02)
    assert not (quiet == plain.flip(2)).flatten(1).all(1).any()
