"""Rotation against torchvision, image by image."""

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor

from bdclean.functional.rotation import rotate


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(batch: int, height: int = 32, width: int = 32) -> Tensor:
    """Every pixel has a value of its own, above 0, so that nothing is right by chance."""
    values = torch.randperm(batch * 3 * height * width, generator=_generator(1)) + 1
    return (values / (len(values) + 1)).view(batch, 3, height, width)


def _share_of_pixels_that_differ(images: Tensor, others: Tensor) -> float:
    return (images != others).any(1).float().mean().item()


@pytest.mark.parametrize("size", [(32, 32), (31, 33), (20, 45), (5, 9), (1, 1)])
def test_rotation_equals_torchvision(size: tuple[int, int]) -> None:
    images = _images(60, *size)
    degrees = torch.linspace(-10, 10, 60)
    degrees[:4] = torch.tensor([0.0, 44.0, -91.0, 170.0])
    expected = [tv.rotate(i, d) for i, d in zip(images, degrees.tolist(), strict=True)]
    # a pixel may lie on the border between two, up to float32 rounding
    assert _share_of_pixels_that_differ(rotate(images, degrees), torch.stack(expected)) < 1e-3


def test_rotation_by_nothing_and_by_a_right_angle() -> None:
    images = _images(2)
    assert torch.equal(rotate(images, torch.zeros(2)), images)
    turned = rotate(images, torch.tensor([90.0, -90.0]))
    assert torch.equal(turned[0], images[0].rot90(1, (1, 2)))  # counter-clockwise
    assert torch.equal(turned[1], images[1].rot90(-1, (1, 2)))


def test_flipping_before_a_rotation_is_flipping_after_the_opposite_one() -> None:
    images, degrees = _images(40), torch.linspace(-10, 10, 40)
    before, after = rotate(images.flip(3), degrees), rotate(images, -degrees).flip(3)
    assert _share_of_pixels_that_differ(before, after) < 1e-3
