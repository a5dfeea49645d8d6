"""Feature consistency towards transformations (FCT), the score of D-BR and D-ST.

Features of a poisoned image follow its trigger; rotated and shifted, the trigger no longer works,
and the features move further than those of a clean image.

Source: Chen, Wu, Wang: Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples,
NeurIPS 2022 (code: SCLBD/Effective_backdoor_defense).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from bdclean.functional.rotation import rotate


def feature_consistency(features: Tensor, transformed: Tensor) -> Tensor:
    """Computes the mean squared difference of each pair of features; 0 is full consistency.

    Args:
        features: h(x), (B, D).
        transformed: h(T(x)), (B, D).

    Returns:
        (B,), float32.
    """
    return (features.float() - transformed.float()).square().mean(1)


def intra_class_loss(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Computes how similar the class means of a batch are.

    With the means of the k classes of the batch scaled to unit length, it is the mean over all
    k * k entries of their Gram matrix, whose diagonal is set to 0.

    Args:
        features: (B, D).
        labels: (B,), from 0 to `num_classes` - 1.
        num_classes: K; classes that the batch lacks do not count.

    Returns:
        A scalar, computed in float32 also under autocast. It is 0 for a batch of one class.
    """
    with torch.autocast(features.device.type, enabled=False):
        member = one_hot(labels, num_classes).float()  # (B, K)
        counts = member.sum(0)
        # A class that is not there has the mean 0, and products of 0 with the others.
        means = normalize(member.T @ features.float() / counts.clamp(min=1)[:, None], dim=1)
        gram = means @ means.T
        return (gram.sum() - gram.diagonal().sum()) / counts.count_nonzero().square()


def draw_transforms(
    size: int, side: int, degrees: float, translate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws a rotation and a shift for each image, as torchvision's random transforms do.

    Args:
        size: Number of images N.
        side: Of the images, in pixels.
        degrees: Angles are uniform within plus and minus this.
        translate: Shifts are uniform within plus and minus this part of the side, then rounded.
        generator: On the CPU.

    Returns:
        Angles (N,), float32, and shifts (N, 2), int64, down and to the right.
    """
    angles = torch.empty(size).uniform_(-degrees, degrees, generator=generator)
    reach = translate * side
    shifts = torch.empty(size, 2).uniform_(-reach, reach, generator=generator).round().long()
    return angles, shifts


def rotate_and_shift(images: Tensor, degrees: Tensor, shifts: Tensor) -> Tensor:
    """Rotates images about their centres, then shifts them; what comes from outside is 0.

    Args:
        images: (B, 3, H, W).
        degrees: (B,), counter-clockwise.
        shifts: (B, 2), int64: pixels down and to the right.

    Returns:
        (B, 3, H, W).
    """
    turned = rotate(images, degrees)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - shifts[:, :1]  # (B, H), read from where
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]  # (B, W)
    inside = _within(rows, height)[:, None, :, None] & _within(columns, width)[:, None, None, :]
    image = torch.arange(len(images), device=images.device)[:, None, None]
    row, column = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    return turned[image, :, row, column].permute(0, 3, 1, 2) * inside


def _within(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)
