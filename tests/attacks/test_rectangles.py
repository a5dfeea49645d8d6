"""Triggers of images that are not square: 24 rows and 40 columns."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdclean.attacks import (
    SIG,
    AdaptiveBlend,
    AdaptivePatch,
    BadNets,
    Blend,
    InputAware,
    LabelConsistent,
    Trigger,
    WaNet,
    assets,
)
from bdclean.attacks.assets_patches import LOGO_QUARTERS, PATCHES, patch
from bdclean.attacks.input_aware import InputAwareTrigger, TriggerGenerator, mix, threshold
from bdclean.attacks.wanet import draw_field, draw_jitter
from bdclean.errors import AttackError
from bdclean.functional.seeds import derive_seed

H, W = SIZE = (24, 40)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(count: int = 4) -> Tensor:
    images = torch.rand(count, 3, H, W, generator=generator(1))
    images[0], images[1] = 0.0, 1.0
    return images


def stored(count: int = 6) -> Tensor:
    shape = (count, 3, H, W)
    return torch.randint(0, 256, shape, generator=generator(2), dtype=torch.uint8)


def places(mask: Tensor) -> list[int]:
    rows, columns = mask[0].nonzero(as_tuple=True)
    return [int(v) for v in (rows.min(), rows.max(), columns.min(), columns.max())]


# ---------------------------------------------------------------------- every trigger


def test_the_contract_of_a_trigger(attack, tmp_path):
    trigger = attack.make_trigger(SIZE)
    assert trigger.size == SIZE
    images, rows = floats(), stored()
    out = trigger(images)
    assert out.shape == images.shape
    assert not torch.equal(out, images)
    assert torch.equal(out, torch.stack([trigger(image) for image in images]))
    assert torch.equal(trigger.poison(rows), torch.stack([trigger.poison(row) for row in rows]))
    trigger.save(tmp_path / "trigger.safetensors")
    loaded = Trigger.load(tmp_path / "trigger.safetensors")
    assert loaded.size == SIZE
    assert loaded.fingerprint == trigger.fingerprint
    assert torch.equal(loaded.poison(rows), trigger.poison(rows))
    with pytest.raises(AttackError, match=r"\(B, 3, 24, 40\) or \(3, 24, 40\)\.$"):
        trigger(images.mT)


def test_training_rows(attack):
    plan = attack.plan(torch.arange(100) % 10, 10)
    trigger, images = attack.make_trigger(SIZE), stored(len(plan.touched_index))
    out = attack.poison_rows(images, plan, trigger)
    assert out.shape == images.shape
    assert attack.dynamic or not torch.equal(out, images)


def test_chunks_count_the_pixels(monkeypatch):
    trigger = BadNets().make_trigger((8, 512))
    sizes = []
    monkeypatch.setattr(
        type(trigger), "stamp", lambda self, x: (sizes.append(x.numel()), x.clone())[1]
    )
    trigger.poison(torch.zeros(100, 3, 8, 512, dtype=torch.uint8))
    assert max(sizes) <= 2**18 < 2 * max(sizes)


@pytest.mark.parametrize("size", [32, (32,), (32, 0), (32, 3.5), (3, 32, 32)])
def test_sizes_that_are_none(size):
    with pytest.raises(AttackError, match=r"^size=.*: it must be \(height, width\), two integers"):
        Blend().make_trigger(size)


# ---------------------------------------------------------------------- patches


@pytest.mark.parametrize(
    ("position", "top", "left"),
    [
        ("top_left", 0, 0),
        ("top_right", 0, 36),
        ("bottom_left", 20, 0),
        ("bottom_right", 20, 36),
        ("center", 10, 18),
    ],
)
def test_badnets_changes_its_patch_and_nothing_else(position, top, left):
    images = stored()
    out = (
        BadNets(pattern="white", patch_size=4, position=position).make_trigger(SIZE).poison(images)
    )
    expected = images.clone()
    expected[:, :, top : top + 4, left : left + 4] = 255
    assert torch.equal(out, expected)


def test_a_patch_must_fit_the_shorter_side():
    assert BadNets(patch_size=24).make_trigger(SIZE).mask.sum() == 24**2
    message = r"^patch_size=25: it must be at most the side of an image of 24x40\.$"
    with pytest.raises(AttackError, match=message):
        BadNets(patch_size=25).make_trigger(SIZE)
    message = r"^patch_size=13: it must be at most 12 .* of an image of 40x24\.$"
    with pytest.raises(AttackError, match=message):
        LabelConsistent(patch="corners4", patch_size=13).make_trigger((40, 24))


def test_four_corners_are_their_own_mirror_image():
    trigger = LabelConsistent(patch="corners4").make_trigger(SIZE)
    corner = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    expected = torch.zeros(H, W)
    expected[:3, -3:] = expected[-3:, -3:] = corner
    expected[:3, :3] = expected[-3:, :3] = corner.flip(1)
    assert torch.equal(trigger.pattern, expected.expand(3, H, W))
    assert trigger.mask.sum() == 36


@pytest.mark.parametrize(
    ("name", "wide", "tall"),
    [
        ("white_square", [21, 23, 37, 39], [37, 39, 21, 23]),
        ("color_square", [16, 21, 32, 37], [32, 37, 16, 21]),
        ("emblem", [20, 23, 36, 39], [36, 39, 20, 23]),
        ("emblem_pair", [20, 23, 0, 39], [36, 39, 0, 23]),
        ("corners4", [0, 23, 0, 39], [0, 39, 0, 23]),
        ("logo", [1, 10, 29, 38], [1, 10, 13, 22]),
    ],
)
def test_drawn_patches_grow_with_the_shorter_side_and_keep_their_corner(name, wide, tall):
    picture, mask = patch(name, SIZE)
    assert (picture.shape, mask.shape) == ((3, H, W), (1, H, W))
    assert places(mask) == wide
    assert places(patch(name, (W, H))[1]) == tall
    square, covered = patch(name, (H, H))
    if name not in ("emblem_pair", "corners4"):  # the same patch, further to the right
        assert torch.equal(picture[..., W - H :], square)
        assert torch.equal(mask[..., W - H :], covered)
        assert mask[..., : W - H].sum() == 0


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("size", [(7, 40), (40, 7)])
def test_a_side_too_short_for_drawn_patches(name, size):
    message = rf"^patches={name}: .* 8x8 pixels or more, not {size[0]}x{size[1]}\.$"
    with pytest.raises(AttackError, match=message):
        patch(name, size, "patches")


def test_the_quarters_make_up_the_logo():
    trigger = AdaptivePatch(test_patches=LOGO_QUARTERS).make_trigger(SIZE)
    picture, mask = patch("logo", SIZE)
    expected = torch.where(mask.bool(), picture, floats())
    torch.testing.assert_close(trigger(floats()), expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- pictures and signals


@pytest.mark.parametrize("image", assets.PICTURES)
def test_blend_is_its_formula(image):
    picture = assets.picture(image, SIZE, 3)[0]
    assert picture.shape == (3, H, W)
    trigger = Blend(alpha=0.3, image=image, image_seed=3).make_trigger(SIZE)
    expected = 0.7 * floats().double() + 0.3 * picture.double()
    torch.testing.assert_close(trigger(floats()).double(), expected, atol=1e-6, rtol=0)


def test_noise_fills_the_rectangle():
    drawn = torch.randint(0, 256, (3, 24, 40), generator=generator(3)) / 255
    assert torch.equal(assets.noise_uniform(SIZE, 3), drawn)


def test_the_cartoon_is_stretched():
    square, wide = (assets.cartoon_balloon(size) for size in ((32, 32), (32, 64)))
    halved = torch.nn.functional.avg_pool2d(wide[None], (1, 2))[0]
    assert (halved - square).abs().mean() < 0.005
    assert (assets.cartoon_balloon((64, 32)) - wide.mT).abs().mean() > 0.1  # not the other way


def test_a_picture_of_the_user_is_resized_to_height_and_width(tmp_path):
    pixels = np.zeros((48, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 255  # the right half
    Image.fromarray(pixels).save(tmp_path / "own.png")
    picture = assets.from_file(str(tmp_path / "own.png"), SIZE)[0]
    assert picture.shape == (3, H, W)
    assert picture[..., :19].max() == 0
    assert picture[..., 21:].min() == 1


def test_sig_has_its_cycles_over_the_width():
    wave = torch.tensor([20 / 255 * math.sin(2 * math.pi * 6 * j / 40) for j in range(40)])
    trigger = SIG().make_trigger(SIZE)
    grey = torch.full((1, 3, H, W), 0.5)
    expected = (0.5 + wave).expand(1, 3, H, W)
    torch.testing.assert_close(trigger(grey), expected, atol=1e-6, rtol=0)


def test_adaptive_blend_shows_squares_of_the_image():
    attack = AdaptiveBlend(alpha_train=0.25)
    plan = attack.plan(torch.arange(100) % 10, 10)
    count = len(plan.touched_index)
    clean, trigger = stored(count), attack.make_trigger(SIZE)
    out = attack.poison_rows(clean, plan, trigger)
    shown = attack.pieces(count).repeat_interleave(6, 1).repeat_interleave(10, 2)[:, None]
    share = 0.25 * shown.double()
    expected = (1 - share) * clean.double() + share * 255 * trigger.picture.double()
    assert (out - expected).abs().max() <= 0.5 + 1e-4
    for size in ((24, 42), (26, 40)):
        with pytest.raises(AttackError, match=rf"^grid=4: .* of {size[0]}x{size[1]}\.$"):
            attack.make_trigger(size)


# ---------------------------------------------------------------------- warps


def test_the_warp_is_its_formula_pixel_by_pixel():
    attack = WaNet(strength=3.0, grid_size=5, grid_seed=2, grid_rescale=0.95)
    trigger, images = attack.make_trigger(SIZE), floats().double()
    field = draw_field(SIZE, 5, generator(derive_seed("wanet", 2)))[0].double()
    out = trigger.stamp(images)
    for r in range(H):
        for c in range(W):
            x = 0.95 * (2 * c / (W - 1) - 1 + 3 * field[r, c, 0].item() / W)
            y = 0.95 * (2 * r / (H - 1) - 1 + 3 * field[r, c, 1].item() / H)
            column = (min(max(x, -1), 1) + 1) / 2 * (W - 1)
            row = (min(max(y, -1), 1) + 1) / 2 * (H - 1)
            left, top = min(int(column), W - 2), min(int(row), H - 2)
            u, v = column - left, row - top
            upper = (1 - u) * images[..., top, left] + u * images[..., top, left + 1]
            lower = (1 - u) * images[..., top + 1, left] + u * images[..., top + 1, left + 1]
            expected = (1 - v) * upper + v * lower
            torch.testing.assert_close(out[..., r, c], expected, atol=1e-5, rtol=0)


def test_the_field_meets_the_control_points_in_the_corners():
    control = torch.rand(1, 2, 4, 4, generator=generator(3)) * 2 - 1
    control /= control.abs().mean()
    field = draw_field(SIZE, 4, generator(3)).permute(0, 3, 1, 2)
    assert field.shape == (1, 2, H, W)
    corners = (slice(None), slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    torch.testing.assert_close(field[corners], control[corners], atol=1e-5, rtol=0)


def test_pixels_move_as_far_as_in_a_square():
    sides = torch.tensor([W - 1, H - 1]) / 2
    moves = []
    for seed in range(20):
        still = WaNet(strength=0.0).make_trigger(SIZE).grid
        moves.append((WaNet(grid_seed=seed).make_trigger(SIZE).grid - still) * sides)
    moved = torch.stack(moves)
    assert moved.norm(dim=-1).max() < 1
    assert moved.norm(dim=-1).mean().item() == pytest.approx(0.28, abs=0.03)
    along, down = moved.abs().mean((0, 1, 2, 3))  # whatever the length of the side
    assert along.item() == pytest.approx(down.item(), rel=0.25)


def test_noise_images_jitter_by_pixels():
    trigger = WaNet(strength=0.0).make_trigger(SIZE)
    jitter = draw_jitter(2, SIZE, generator(5))
    assert jitter.shape == (2, H, W, 2)
    ramp = torch.stack([(torch.arange(W) / (W - 1)).expand(H, W)] * 3)
    tall = torch.stack([(torch.arange(H) / (H - 1))[:, None].expand(H, W)] * 3)
    out = trigger.noise(torch.stack([ramp, tall]), jitter)
    for image, axis, side in ((0, 0, W), (1, 1, H)):
        start = (ramp if axis == 0 else tall)[0]
        expected = (start + jitter[image, ..., axis] / side / 2).clamp(0, 1)
        torch.testing.assert_close(out[image, 0], expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- a learned trigger


def learned() -> InputAwareTrigger:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        networks = [TriggerGenerator(n, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)) for n in (3, 1)]
    return InputAwareTrigger(*networks, SIZE)


def test_the_input_aware_trigger_is_its_formula_and_is_saved(tmp_path):
    trigger, images = learned(), floats()
    expected = mix(images, trigger.pattern(images), threshold(trigger.mask(images)))
    torch.testing.assert_close(trigger(images), expected.clamp(0, 1))
    trigger.save(tmp_path / "trigger.safetensors")
    attack = InputAware(trigger=str(tmp_path / "trigger.safetensors"))
    made = attack.make_trigger(SIZE)
    assert made.fingerprint == trigger.fingerprint
    assert torch.equal(made.poison(stored()), trigger.poison(stored()))
    with pytest.raises(AttackError, match=r"^trigger=.* images of 40x24 pixels, not 24x40\.$"):
        attack.make_trigger((40, 24))


@pytest.mark.parametrize("size", [(24, 20), (20, 24)])
def test_the_networks_need_multiples_of_eight_on_both_sides(size):
    networks = learned()
    with pytest.raises(AttackError, match=r"^input_size=\(2., 2.\): it must be a multiple of 8"):
        InputAwareTrigger(networks.pattern, networks.mask, size)


def test_an_unlearned_trigger_takes_any_size(tmp_path):
    made = InputAware().make_trigger((23, 41))
    made.save(tmp_path / "trigger.safetensors")
    loaded = Trigger.load(tmp_path / "trigger.safetensors")
    assert loaded.size == (23, 41)
    assert loaded.fingerprint == made.fingerprint
