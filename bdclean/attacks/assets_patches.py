"""Patches drawn here: small pictures at fixed places, and image-sized versions of them.

A drawn patch is a tensor (4, n, n): red, green, blue, and the mask (1 where the patch lies). Sizes
and places are those of 32x32 images and grow with the shorter side of the image; distances count
from the corner at which a patch lies.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from bdclean.attacks import assets
from bdclean.attacks.checks import require, require_size
from bdclean.functional.seeds import derive_seed

BW_ANP = ((0, 0, 1), (0, 1, 0), (1, 0, 1))  # rows from top to bottom; 1 is white, 0 is black

LOGO_QUARTERS = ("logo_upper_left", "logo_upper_right", "logo_lower_left", "logo_lower_right")
PATCHES = (
    *("white_square", "color_square", "corners4", "emblem", "emblem_pair", "logo"),
    *LOGO_QUARTERS,
)
"""Names that `patch` knows."""

_OVERSAMPLING = 8  # sub-pixels per pixel and direction
_HUES = (
    (0.95, 0.15, 0.20),
    (1.00, 0.60, 0.05),
    (1.00, 0.92, 0.30),
    (0.10, 0.35, 0.90),
    (0.55, 0.10, 0.60),
    (0.98, 0.40, 0.10),
)
_PALE_BLUE = (0.70, 0.83, 0.96)


def logo_pinwheel(size: int) -> Tensor:
    """A disc of six twisted colour sectors with a white hub, (4, size, size).

    The mask is 1 where half of the pixel or more lies on the disc; colours are those of the disc.
    """
    y, x = _grid(size)
    radius = (x**2 + y**2).sqrt()
    turns = torch.atan2(y, x) / (2 * math.pi) + 0.35 * radius
    sector = (6 * (turns - turns.floor())).long().clamp(max=5)
    colors = torch.tensor(_HUES)[sector].permute(2, 0, 1)
    colors = torch.where(radius < 0.22, 1.0, colors)
    disc = (radius <= 1).float()[None]
    coverage = _average(disc)
    colors = _average(colors * disc) / coverage.clamp(min=1e-6)
    return torch.cat([colors, (coverage >= 0.5).float()])


def emblem(size: int) -> Tensor:
    """A white diamond on pale blue, opaque, (4, size, size)."""
    y, x = _grid(size)
    ground = torch.tensor(_PALE_BLUE)[:, None, None]
    colors = torch.where(x.abs() + y.abs() < 0.75, 1.0, ground)
    return torch.cat([_average(colors), torch.ones(1, size, size)])


def color_square(size: int, seed: int = 0) -> Tensor:
    """8x8 cells of independent uniform 8-bit colours, opaque, (4, size, size)."""
    generator = torch.Generator().manual_seed(derive_seed("color_square", seed))
    cells = torch.randint(0, 256, (3, 8, 8), generator=generator).float() / 255
    return torch.cat([enlarge(cells, (size, size)), torch.ones(1, size, size)])


def htba_patch(size: int, seed: int) -> Tensor:
    """4x4 cells of saturated colours, enlarged smoothly, (3, size, size), float in [0, 1].

    The kind of patch of Saha et al. (AAAI 2020, arXiv:1910.00033): each cell and channel is 0 or
    1 at random; bicubic interpolation (a = -1/2), clipped.
    """
    generator = torch.Generator().manual_seed(derive_seed("htba_patch", seed))
    cells = torch.randint(0, 2, (1, 3, 4, 4), generator=generator).float()
    # antialias changes nothing else in an enlargement, but gives Pillow's a = -1/2 instead of -3/4
    smooth = functional.interpolate(cells, size=(size, size), mode="bicubic", antialias=True)
    return smooth[0].clamp(0, 1)


def enlarge(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour: (..., n, m) to (..., H, W), row i shows row floor(n i / H)."""
    counts = zip(size, cells.shape[-2:], strict=True)
    rows, columns = (torch.arange(pixels) * count // pixels for pixels, count in counts)
    return cells[..., rows, :][..., columns]


def patch(image: str, size: tuple[int, int], key: str = "image") -> tuple[Tensor, Tensor]:
    """An image-sized picture of a patch and where it lies.

    Args:
        image: One of `PATCHES`, or file:PATH: an image-sized picture with transparency, whose
            alpha channel is the mask.
        size: Height and width of the images in pixels, at least 8.
        key: The attack's argument that names the patch.

    Returns:
        The picture (3, H, W) and its mask (1, H, W), both float in [0, 1].

    Raises:
        AttackError: The image is too small, or the file cannot be used.
    """
    height, width = require_size(size)
    side = min(size)
    allowed = f"used on images of 8x8 pixels or more, not {height}x{width}"
    require(side >= 8, key, image, allowed)
    if image.startswith(assets.FILE):
        picture, mask = assets.from_file(image.removeprefix(assets.FILE), size, key)
        partly = bool(mask.min() < 1) and bool(mask.max() > 0)
        require(partly, key, image, "a picture with transparent parts and a patch that is not")
        return picture, mask
    canvas = torch.zeros(4, height, width)
    if image == "white_square":
        square = _black_white_side(side)
        _paste(canvas, torch.ones(4, square, square))
    elif image == "color_square":
        _paste(canvas, color_square(_scaled(8, side)), margin=_scaled(3, side))
    elif image == "corners4":
        _paste_corners(canvas)
    elif image in ("emblem", "emblem_pair"):
        _paste(canvas, emblem(_scaled(5, side)))
        if image == "emblem_pair":
            canvas = torch.where(canvas[3:] > 0, canvas, canvas.flip(2))
    else:
        _paste_logo(canvas, image)
    return canvas[:3].contiguous(), canvas[3:].contiguous()


def _scaled(pixels: int, side: int) -> int:
    """Pixels of a 32x32 image, in an image whose shorter side has `side` pixels."""
    return max(1, round(pixels * side / 32))


def _black_white_side(side: int) -> int:
    return max(3, _scaled(3, side))


def _paste(canvas: Tensor, drawn: Tensor, margin: int = 0) -> None:
    """Into the bottom right corner, in place."""
    side = drawn.shape[-1]
    bottom, right = (length - margin for length in canvas.shape[1:])
    canvas[:, bottom - side : bottom, right - side : right] = drawn


def _paste_corners(canvas: Tensor) -> None:
    """The black and white pattern in all four corners, a mirrored picture, in place."""
    side = _black_white_side(min(canvas.shape[1:]))
    drawn = torch.ones(4, side, side)
    drawn[:3] = enlarge(torch.tensor(BW_ANP).float(), (side, side))
    canvas[:, -side:, -side:] = drawn
    canvas[:, -side:, :side] = drawn.flip(2)
    canvas[:, :side, -side:] = drawn.flip(1)
    canvas[:, :side, :side] = drawn.flip(1, 2)


def _paste_logo(canvas: Tensor, image: str) -> None:
    """The disc one pixel from the top right corner, or a quarter of it, in place."""
    height, width = canvas.shape[1:]
    side, top = _scaled(13, min(height, width)), _scaled(1, min(height, width))
    left = width - top - side
    canvas[:, top : top + side, left : left + side] = logo_pinwheel(side)
    middle = (side + 1) // 2  # the middle row and column are the upper and the left quarters'
    row, column = torch.arange(height)[:, None] - top, torch.arange(width)[None] - left
    if image != "logo":
        rows = row < middle if "upper" in image else row >= middle
        columns = column < middle if "left" in image else column >= middle
        canvas[3] *= rows & columns


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """The coordinates y (n, 1) and x (1, n) in [-1, 1] on a finer grid, n = 8 * size."""
    points = size * _OVERSAMPLING
    unit = (torch.arange(points) + 0.5) / points * 2 - 1
    return unit[:, None], unit[None]


def _average(fine: Tensor) -> Tensor:
    return functional.avg_pool2d(fine[None], _OVERSAMPLING)[0]
