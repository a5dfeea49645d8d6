"""BadNets against its formula and the published arrays."""

import math

import pytest
import torch

from bdclean.attacks import BadNets

BW_ANP = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
CHECKER = [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
WHITE = [[255] * 3] * 3


def stored(count: int = 4, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 255, (count, 3, size, size), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(
    ("pattern", "values"), [("bw_anp", BW_ANP), ("checker", CHECKER), ("white", WHITE)]
)
@pytest.mark.parametrize(
    ("position", "row", "column"),
    [
        ("top_left", 0, 0),
        ("top_right", 0, 29),
        ("bottom_left", 29, 0),
        ("bottom_right", 29, 29),
        ("center", 14, 14),
    ],
)
def test_exactly_the_nine_pixels_change(pattern, values, position, row, column):
    images = stored()
    expected = images.clone()
    expected[:, :, row : row + 3, column : column + 3] = torch.tensor(values, dtype=torch.uint8)
    trigger = BadNets(pattern=pattern, position=position).make_trigger((32, 32))
    out = trigger.poison(images)
    assert torch.equal(out, expected)
    # stored() has neither 0 nor 255, so each of the 9 pixels changes in all channels
    assert ((out != images).sum(dim=(1, 2, 3)) == 27).all()
    floats = images.float() / 255
    assert torch.equal(trigger(floats), expected.float() / 255)


def test_applying_twice_is_applying_once():
    trigger = BadNets().make_trigger((32, 32))
    once = trigger.poison(stored())
    assert torch.equal(trigger.poison(once), once)


def test_psnr_is_at_least_that_of_nine_inverted_pixels():
    bound = 10 * math.log10(1024 / 9)
    assert bound == pytest.approx(20.56, abs=0.005)
    trigger = BadNets(pattern="white").make_trigger((32, 32))
    worst = torch.zeros(3, 32, 32)
    mse = (trigger(worst) - worst).pow(2).mean().item()
    assert 10 * math.log10(1 / mse) == pytest.approx(bound, abs=1e-4)
    images = stored().float() / 255
    errors = (BadNets().make_trigger((32, 32))(images) - images).pow(2).mean(dim=(1, 2, 3))
    assert (10 * torch.log10(1 / errors) >= bound).all()


@pytest.mark.parametrize("size", [6, 21])
def test_larger_patches_repeat_whole_pixels(size):
    k = size // 3
    expected = torch.tensor(BW_ANP).repeat_interleave(k, 0).repeat_interleave(k, 1)
    trigger = BadNets(patch_size=size, position="top_left").make_trigger((64, 64))
    out = trigger.poison(torch.full((3, 64, 64), 7, dtype=torch.uint8))
    assert torch.equal(out[:, :size, :size].long(), expected.expand(3, -1, -1))
    assert (out == 7).sum() == 3 * (64 * 64 - size * size)


def test_a_patch_that_is_no_multiple_of_three_is_still_black_and_white():
    trigger = BadNets(patch_size=5, position="top_left").make_trigger((8, 8))
    out = trigger.poison(torch.full((3, 8, 8), 7, dtype=torch.uint8))[0, :5, :5].long()
    rows = [0, 0, 1, 1, 2]
    assert torch.equal(out, torch.tensor(BW_ANP)[rows][:, rows])


def test_a_patch_as_large_as_the_image_covers_it():
    out = BadNets(pattern="white", patch_size=8).make_trigger((8, 8)).poison(stored(2, 8))
    assert (out == 255).all()


def test_the_colour_patch_lies_in_the_centre_of_a_large_image():
    attack = BadNets(pattern="htba", position="center", patch_size=32)
    trigger = attack.make_trigger((224, 224))
    rows, columns = trigger.mask[0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (96, 127, 96, 127)
    assert trigger.mask.sum() == 32 * 32
    other = BadNets(pattern="htba", position="center", patch_size=32, seed=1)
    assert torch.equal(other.make_trigger((224, 224)).pattern, trigger.pattern)
    recoloured = BadNets(pattern="htba", position="center", patch_size=32, pattern_seed=1)
    assert not torch.equal(recoloured.make_trigger((224, 224)).pattern, trigger.pattern)
    assert torch.equal(recoloured.make_trigger((224, 224)).mask, trigger.mask)


def test_describe_names_what_defines_the_attack():
    assert BadNets(target=6, rate=0.06, position="top_left").describe() == {
        "attack": "BadNets",
        "target": 6,
        "rate": 0.06,
        "rate_base": "dataset",
        "label_rule": "all_to_one",
        "exclude_target": False,
        "seed": 0,
        "quantize": "round",
        "pattern": "bw_anp",
        "position": "top_left",
        "patch_size": 3,
        "pattern_seed": 0,
    }
    assert BadNets(label_rule="all_to_all").describe()["target"] is None
