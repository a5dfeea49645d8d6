"""The drawn patches: statistics, places, symmetries, and pictures of the user."""

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.attacks import assets_patches
from bdclean.attacks.assets_patches import LOGO_QUARTERS, PATCHES, patch
from bdclean.errors import AttackError


def extent(mask):
    rows, columns = mask[0].nonzero(as_tuple=True)
    return [int(v) for v in (rows.min(), rows.max(), columns.min(), columns.max())]


def test_the_logo_has_the_published_statistics():
    logo = assets_patches.logo_pinwheel(13)
    inside = logo[3].bool()
    assert set(logo[3].unique().tolist()) == {0.0, 1.0}
    assert inside.sum() == 137
    mean = logo[:3, inside].mean(1).tolist()
    assert mean == pytest.approx([0.776, 0.448, 0.387], abs=0.001)
    assert (logo[:3, 6, 6] == 1).all()  # the hub is white
    assert logo[:3].min() >= 0
    assert logo[:3].max() <= 1 + 1e-6


def test_the_six_sectors_of_the_logo_are_its_colours():
    logo = assets_patches.logo_pinwheel(101)
    colors = torch.tensor(assets_patches._HUES)
    # just outside the hub, in the middle of a sector: turns = (k + 1/2) / 6 - 0.35 r
    r = 0.6
    for k, color in enumerate(colors):
        angle = torch.tensor(2 * torch.pi * ((k + 0.5) / 6 - 0.35 * r))
        x, y = (int((r * f(angle) + 1) / 2 * 101) for f in (torch.cos, torch.sin))
        assert torch.allclose(logo[:3, y, x], color, atol=1e-5)


def test_the_quarters_of_the_logo_are_disjoint_and_make_it_up():
    picture, mask = patch("logo", (32, 32))
    quarters = [patch(name, (32, 32)) for name in LOGO_QUARTERS]
    assert [int(m.sum()) for _, m in quarters] == [41, 34, 34, 28]
    assert torch.equal(sum(m for _, m in quarters), mask)  # a sum of disjoint masks is 0 or 1
    assert all(torch.equal(p, picture) for p, _ in quarters)
    assert [extent(m) for _, m in quarters] == [
        [1, 7, 18, 24],
        [1, 7, 25, 30],
        [8, 13, 18, 24],
        [8, 13, 25, 30],
    ]


@pytest.mark.parametrize(
    ("name", "size", "places"),
    [
        ("logo", 32, [1, 13, 18, 30]),
        ("logo", 64, [2, 27, 36, 61]),
        ("logo", 224, [7, 97, 126, 216]),
        ("white_square", 32, [29, 31, 29, 31]),
        ("white_square", 64, [58, 63, 58, 63]),
        ("white_square", 224, [203, 223, 203, 223]),
        ("color_square", 32, [21, 28, 21, 28]),
        ("color_square", 224, [147, 202, 147, 202]),
        ("emblem", 32, [27, 31, 27, 31]),
        ("emblem_pair", 32, [27, 31, 0, 31]),
        ("corners4", 32, [0, 31, 0, 31]),
    ],
)
def test_places_grow_with_the_image(name, size, places):
    assert extent(patch(name, (size, size))[1]) == places


@pytest.mark.parametrize("name", PATCHES)
def test_shapes_ranges_and_determinism(name):
    for size in (8, 33):
        picture, mask = patch(name, (size, size))
        assert picture.shape == (3, size, size)
        assert mask.shape == (1, size, size)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert picture.min() >= 0
        assert picture.max() <= 1 + 1e-6
        again = patch(name, (size, size))
        assert torch.equal(again[0], picture)
        assert torch.equal(again[1], mask)


def test_the_white_square_is_white():
    picture, mask = patch("white_square", (32, 32))
    assert torch.equal(picture, mask.expand(3, -1, -1))


def test_the_corners_are_mirrored_copies():
    picture, mask = patch("corners4", (32, 32))
    assert mask.sum() == 36
    assert torch.equal(picture, picture.flip(1))
    assert torch.equal(picture, picture.flip(2))
    assert picture[0, 29:, 29:].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert picture[0, 29:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_the_emblem_is_pale_blue_and_white():
    picture, mask = patch("emblem", (32, 32))
    assert mask.sum() == 25
    inside = picture[:, mask[0].bool()]
    assert (inside.mean(1) > torch.tensor([0.7, 0.8, 0.95])).all()
    assert (picture[:, 29, 29] == 1).all()
    assert picture[2, 27, 27] > picture[1, 27, 27] > picture[0, 27, 27]
    pair, both = patch("emblem_pair", (32, 32))
    assert both.sum() == 50
    assert torch.equal(pair, pair.flip(2))
    assert torch.equal(pair[..., 16:], picture[..., 16:])


def test_the_colour_square_is_drawn_from_its_seed_and_enlarged_whole():
    square = assets_patches.color_square(8)
    assert torch.equal((square[:3] * 255).round() / 255, square[:3])
    assert len(square[:3].unique()) > 100
    large = assets_patches.color_square(16)
    assert torch.equal(large[:, ::2, ::2], square)
    assert torch.equal(large[:, 1::2, 1::2], square)
    assert not torch.equal(assets_patches.color_square(8, seed=1), square)


@pytest.mark.parametrize("size", [32, 80, 50])
def test_the_saturated_cells_of_the_htba_patch(size):
    drawn = assets_patches.htba_patch(size, seed=3)
    again = assets_patches.htba_patch(4, seed=3)
    assert set(again.unique().tolist()) == {0.0, 1.0}
    centre = (torch.arange(4) + 0.5) * size / 4 - 0.5  # between two pixels, or on one
    low, high = centre.floor().long(), centre.ceil().long()
    found = sum(drawn[:, r][:, :, c] for r in (low, high) for c in (low, high)) / 4
    assert (found - again).abs().max() <= 8 / 255
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert not torch.equal(assets_patches.htba_patch(size, seed=4), drawn)


def write(path, alpha):
    pixels = np.zeros((16, 16, 4))
    pixels[..., 0] = 200
    pixels[..., 3] = alpha
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return f"file:{path}"


def test_the_opaque_part_of_a_picture_of_the_user_is_the_patch(tmp_path):
    alpha = np.zeros((16, 16))
    alpha[:4, 12:] = 255
    picture, mask = patch(write(tmp_path / "own.png", alpha), (16, 16))
    assert torch.equal(mask[0], torch.from_numpy(alpha / 255).float())
    assert torch.allclose(picture[:, :4, 12:], torch.tensor([200 / 255, 0, 0])[:, None, None])


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_picture_without_a_patch_is_refused(alpha, tmp_path):
    name = write(tmp_path / "own.png", np.full((16, 16), alpha))
    with pytest.raises(AttackError, match=r"^patches=file:.*transparent parts"):
        patch(name, (16, 16), "patches")
