"""Pictures for triggers: drawn here, or read from a file of the user. None is shipped."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bdclean.attacks.checks import require
from bdclean.errors import AttackError
from bdclean.pictures import UnreadableError, decoded

Color = tuple[float, float, float]

FILE = "file:"  # before the path of a picture of the user
PICTURES = ("noise", "noise_gauss", "cartoon")  # whole pictures that are drawn here

_OVERSAMPLING = 8  # sub-pixels per pixel and direction
_OUTLINE = 0.025  # width, in units of the picture


def noise_uniform(size: tuple[int, int], seed: int) -> Tensor:
    """Independent uniform 8-bit values, (3, H, W), float in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator).float() / 255


def noise_gauss(size: tuple[int, int], seed: int, mean: float = 0.5, std: float = 0.29) -> Tensor:
    """Independent normal values clipped to [0, 1], (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return (mean + std * torch.randn(3, *size, generator=generator)).clamp(0, 1)


def require_image(key: str, image: str, builtin: tuple[str, ...]) -> None:
    """Raises an AttackError unless `image` is the name of a picture or file:PATH."""
    known = image in builtin or (image.startswith(FILE) and image != FILE)
    require(known, key, image, f"one of {', '.join(builtin)}, or file:PATH")


def recorded(value: Any) -> Any:
    """An argument of an attack, ready for JSON; of a file only its name, without its folder."""
    if isinstance(value, list | tuple):
        return [recorded(each) for each in value]
    if isinstance(value, str):
        prefix = FILE if value.startswith(FILE) else ""
        path = Path(value.removeprefix(prefix))
        return prefix + path.name if prefix or path.is_absolute() else value
    return value if value is None or isinstance(value, int | float) else repr(value)


def picture(image: str, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """One of `PICTURES`, or a file.

    Args:
        image: Name, or file:PATH.
        size: Height and width in pixels.
        seed: Of the two noise pictures.

    Returns:
        The picture (3, H, W) and its mask (1, H, W), both float in [0, 1].

    Raises:
        AttackError: The file is missing or is not a picture.
    """
    if image.startswith(FILE):
        return from_file(image.removeprefix(FILE), size)
    mask = torch.ones(1, *size)
    if image == "noise":
        return noise_uniform(size, seed), mask
    if image == "noise_gauss":
        return noise_gauss(size, seed), mask
    return cartoon_balloon(size), mask


def from_file(path: str, size: tuple[int, int], key: str = "image") -> tuple[Tensor, Tensor]:
    """Reads a picture of the user, resized with antialiasing to height and width.

    Args:
        path: Of the file.
        size: Height and width in pixels.
        key: The attack's argument that names it.

    Returns:
        The picture (3, H, W) and its mask (1, H, W), both float in [0, 1]. The mask is the alpha
        channel, or 1 everywhere if there is none.

    Raises:
        AttackError: The file is missing or is not a picture.
    """
    height, width = size
    try:
        with decoded(Path(path).expanduser(), "RGBA") as image:
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
    except UnreadableError as error:
        raise AttackError(
            f"{key}={FILE}{path}: it cannot be read as a picture ({error.reason}); give the path "
            "of a PNG or JPEG file."
        ) from error
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    return pixels[:3].contiguous(), pixels[3:].contiguous()


def cartoon_balloon(size: tuple[int, int]) -> Tensor:
    """A balloon in flat colours with dark outlines, (3, H, W), float in [0, 1].

    Drawn in unit coordinates on a finer grid and averaged, so that any size works. It has the
    brightness and the coarse structure of the cartoon pictures in published Blend attacks.
    """
    fine = [side * _OVERSAMPLING for side in size]
    rows, columns = ((torch.arange(points) + 0.5) / points for points in fine)
    v, u = rows[:, None], columns[None, :]
    canvas = torch.tensor((1.0, 0.66, 0.50))[:, None, None].repeat(1, *fine)

    def paint(where: Tensor, color: Color) -> None:
        for channel, value in zip(canvas, color, strict=True):
            channel.masked_fill_(where, value)

    clouds = [_ellipse(u, v, cu, cv) for cu, cv in ((0.14, 0.24), (0.86, 0.58))]
    ray = ((u - 0.5) ** 2 + (v - 0.38) ** 2).sqrt()
    disc = ray < 0.34
    paint((v > 0.86) & (u > 0), (0.35, 0.62, 0.30))
    for cloud in clouds:
        paint(cloud < 0, (1.0, 1.0, 1.0))
    paint(disc, (1.0, 1.0, 1.0))
    for k in (-2, 0, 2):
        paint(disc & (((u - 0.5) / 0.34 - 0.36 * k).abs() < 0.18), (1.0, 0.84, 0.08))
    paint(disc & ((v - 0.40).abs() < 0.05), (0.12, 0.50, 0.62))
    for side in (-1, 1):
        rope = (u - 0.5 - side * (0.20 - 0.9 * (v - 0.68))).abs() < 0.012
        paint(rope & (v > 0.66) & (v < 0.82), (0.20, 0.12, 0.10))
    basket = torch.maximum((u - 0.50).abs() - 0.10, (v - 0.86).abs() - 0.06)
    paint(basket < 0, (0.62, 0.38, 0.16))
    for distance in (*clouds, ray - 0.34, basket):
        paint(distance.abs() < _OUTLINE / 2, (0.20, 0.12, 0.10))
    return torch.nn.functional.avg_pool2d(canvas[None], _OVERSAMPLING)[0]


def _ellipse(u: Tensor, v: Tensor, center_u: float, center_v: float) -> Tensor:
    """Roughly the signed distance to a cloud's edge (negative inside); radii 0.12 and 0.07."""
    radius = (((u - center_u) / 0.12) ** 2 + ((v - center_v) / 0.07) ** 2).sqrt()
    return (radius - 1) * 0.095
