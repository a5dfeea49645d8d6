import pytest
import torch

from bdclean.errors import ConfigError
from bdclean.functional.families import (
    PILED,
    PROBES,
    Ball,
    Concentration,
    Patch,
    Universal,
    concentration,
    draw_squares,
    out_of_line,
)


@pytest.fixture
def images():
    return torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def distance(images):
    """How far a random linear network's outputs move, (B,)."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(3 * 16 * 16, 4, generator=draw)
    before = images.flatten(1) @ weight
    return lambda moved: (moved.flatten(1) @ weight - before).square().sum(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", [Ball(), Patch(), Universal()])
def test_a_family_moves_answers_further_than_its_start(family, images, distance):
    """And leaves the images that it is given, and [0, 1], as they are."""
    whole = images.clone()
    moved = family(images, distance, seeded())
    assert torch.equal(images, whole)
    assert moved.shape == images.shape
    assert not moved.requires_grad
    assert moved.min() >= 0
    assert moved.max() <= 1
    still = {"step_size": 1e-9, "steps": 1}
    start = type(family)(**still)(images, distance, seeded())
    assert distance(moved).mean() > 2 * distance(start).mean()
    assert torch.equal(moved, family(images, distance, seeded()))
    assert not torch.equal(moved, family(images, distance, seeded(1)))


def test_a_ball_is_small_and_everywhere(images, distance):
    change = (Ball(epsilon=8)(images, distance, seeded()) - images).abs()
    assert change.max() <= 8 / 255 + 1e-6
    assert (change > 0).float().mean() > 0.9


def test_a_patch_is_one_square_in_each_image(images, distance):
    change = (Patch(sides=(0.2, 0.4))(images, distance, seeded()) - images).abs().amax(1)
    for each in change:
        rows, columns = (each.amax(axis).nonzero().flatten() for axis in (1, 0))
        assert len(rows) <= round(0.4 * 16)
        assert rows.max() - rows.min() < round(0.4 * 16)
        assert columns.max() - columns.min() < round(0.4 * 16)
    assert change.max() > 0.5


def test_squares_lie_inside_and_have_all_sides():
    masks = draw_squares(torch.zeros(3000, 3, 16, 16), (0.12, 0.3), seeded())
    rows, columns = masks.any(3).sum(2).flatten(), masks.any(2).sum(2).flatten()
    assert torch.equal(rows, columns)  # none is cut off
    assert torch.equal(masks.sum((1, 2, 3)), rows * columns)
    assert rows.unique().tolist() == [2, 3, 4, 5]
    assert (rows == 2).float().mean() == pytest.approx(0.25, abs=0.03)
    covered = masks.float().mean((0, 1))
    assert covered.min() > 0  # every corner is reached
    assert draw_squares(torch.zeros(2, 3, 4, 4), (1, 1), seeded()).all()
    assert draw_squares(torch.zeros(9, 3, 8, 8), (0.01, 0.01), seeded()).sum() == 9


def test_a_universal_perturbation_is_the_same_for_all(distance):
    images = 0.3 + 0.4 * torch.rand(40, 3, 16, 16, generator=seeded(2))  # no pixel is cut off
    change = Universal(epsilon=(4, 20))(images, distance, seeded()) - images
    torch.testing.assert_close(change, change[:1].expand_as(change), atol=1e-6, rtol=0)
    sizes = {
        round(
            255
            * (Universal(epsilon=(4, 20))(images, distance, seeded(seed)) - images)
            .abs()
            .max()
            .item()
        )
        for seed in range(12)
    }
    assert 4 <= min(sizes) < 10
    assert 14 < max(sizes) <= 20


def test_where_changed_answers_land():
    before = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    after = torch.tensor([0, 2, 2, 1, 2, 0, 2, 2])
    found = concentration(before, after, 4)
    assert found == Concentration(flipped=5 / 8, share=4 / 5, favourite=2)
    assert found.piled == pytest.approx(4 / 8)
    assert concentration(before, before, 4).flipped == 0
    assert concentration(before, before, 4).share == 0
    assert concentration(before[:0], before[:0], 4).flipped == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(sides=(0.2, 0.1)), r"patch\.sides=\[0\.2, 0\.1\]: it must be the least"),
        (lambda: Patch(sides=(0, 0.1)), r"above 0 and at most 1\."),
        (lambda: Patch(sides=(0.5, float("nan"))), r"patch\.sides="),
        (lambda: Patch(steps=0), "steps=0"),
        (lambda: Universal(epsilon=(9, 8)), r"universal\.epsilon=\[9, 8\]: it must be the least"),
        (lambda: Universal(epsilon=(-1, 8)), "between 0 and 127"),
        (lambda: Universal(epsilon=(0, float("inf"))), "between 0 and 127"),
        (lambda: Universal(step_size=0), "step_size=0"),
        (lambda: Ball(epsilon=-1), "epsilon=-1"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_is_out_of_line():
    def found(**shares):
        names = {"u4": "universal 4", "u8": "universal 8"}
        return {names.get(k, k): Concentration(1.0, s, c) for k, (s, c) in shares.items()}

    assert PROBES.keys() == PILED.keys()
    nothing = found(ball=(0.25, 1), patch=(0.2, 1), u4=(0.15, 1), u8=(0.5, 1))
    assert out_of_line(nothing) == ()
    assert out_of_line(nothing | found(patch=(0.21, 2))) == ("patch",)
    # Of two targets the one that is farther above its bound counts.
    two = nothing | found(ball=(0.9, 2), u4=(0.8, 2), patch=(0.4, 1))
    assert out_of_line(two) == ("ball", "universal 4")
    assert out_of_line(two | found(patch=(0.95, 1))) == ("patch",)
