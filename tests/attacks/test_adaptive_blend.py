"""Adaptive-Blend against its formula, square by square."""

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.attacks import AdaptiveBlend, Blend

LABELS = torch.arange(50_000) % 10


def small(**arguments):
    """An attack with its plan, trigger, clean rows and training rows."""
    attack = AdaptiveBlend(rate=0.3, cover_rate=0.2, **arguments)
    plan = attack.plan(LABELS[:100], 10)
    trigger = attack.make_trigger((32, 32))
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (50, 3, 32, 32), generator=generator).to(torch.uint8)
    return attack, plan, trigger, clean, attack.poison_rows(clean, plan, trigger)


def shown_positions(attack, clean, trigger):
    """(P, H, W), by a loop over squares."""
    pieces = attack.pieces(len(clean))
    side = clean.shape[-1] // attack.grid
    shown = torch.zeros(len(clean), *clean.shape[-2:], dtype=torch.bool)
    for n in range(len(clean)):
        for row in range(attack.grid):
            for column in range(attack.grid):
                down, right = row * side, column * side
                on = bool(pieces[n, row, column])
                shown[n, down : down + side, right : right + side] = on
    return shown


@pytest.mark.parametrize("image", ["cartoon", "noise"])
def test_training_rows_are_their_formula(image):
    attack, _, trigger, clean, seen = small(image=image, alpha_train=0.15)
    x, t = clean.double(), trigger.picture.double() * 255
    shown = shown_positions(attack, clean, trigger)[:, None]
    expected = torch.where(shown, x + 0.15 * (t - x), x)
    assert (seen.double() - expected).abs().max() <= 0.5 + 1e-3


def test_half_of_the_squares_are_bit_equal_to_the_clean_image():
    attack, _, trigger, clean, _ = small()
    black = torch.zeros_like(clean)
    trigger.picture.fill_(1.0)  # so that the picture shows wherever it is
    plan = attack.plan(LABELS[:100], 10)
    changed = (attack.poison_rows(black, plan, trigger) != black).any(1)
    assert (changed.sum((1, 2)) == 512).all()
    squares = changed.view(-1, 4, 8, 4, 8).float().mean((2, 4))
    assert set(squares.unique().tolist()) == {0.0, 1.0}  # whole squares of the grid
    assert ((squares == 0).sum((1, 2)) == 8).all()


def test_every_row_has_squares_of_its_own_and_all_squares_are_used():
    attack = AdaptiveBlend()
    pieces = attack.pieces(3_000)
    assert pieces.shape == (3_000, 4, 4)
    assert (pieces.sum((1, 2)) == 8).all()
    assert len(torch.unique(pieces.flatten(1), dim=0)) > 2_000  # of 12,870
    share = pieces.mean(0)
    assert (share - 0.5).abs().max() < 0.05
    assert torch.equal(pieces, attack.pieces(3_000))
    assert not torch.equal(pieces, AdaptiveBlend(seed=1).pieces(3_000))


@pytest.mark.parametrize(("mask_rate", "on"), [(0.0, 16), (0.25, 12), (0.9, 2), (0.5, 8)])
def test_the_share_of_squares(mask_rate, on):
    assert (AdaptiveBlend(mask_rate=mask_rate).pieces(20).sum((1, 2)) == on).all()


def test_rows_keep_their_squares_when_they_are_worked_on_in_parts(monkeypatch):
    whole = small()[-1]
    monkeypatch.setattr("bdclean.attacks.trigger._CHUNK_VALUES", 7 * 3 * 32 * 32)
    assert torch.equal(small()[-1], whole)


def test_the_change_is_at_most_alpha():
    _, _, _, clean, seen = small(alpha_train=0.15)
    assert (seen.int() - clean.int()).abs().max() <= 0.15 * 255 + 0.5


def test_alpha_zero_is_the_image():
    _, _, trigger, clean, seen = small(alpha_train=0.0, alpha_test=0.0)
    assert torch.equal(seen, clean)
    assert torch.equal(trigger.poison(clean), clean)


def test_the_test_trigger_is_the_whole_picture_whatever_the_seed():
    _, _, trigger, clean, _ = small(alpha_test=0.2, seed=3)
    whole = Blend(alpha=0.2, image="cartoon").make_trigger((32, 32))
    assert torch.equal(trigger.poison(clean), whole.poison(clean))


def test_rows_do_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    first = small()[-1]
    torch.manual_seed(2)
    assert torch.equal(small()[-1], first)


def test_counts_and_labels():
    plan = AdaptiveBlend().plan(LABELS, 10)
    assert len(plan.poison_index) == 2_500
    assert len(plan.cover_index) == 500
    assert not torch.isin(plan.poison_index, plan.cover_index).any()
    assert (plan.labels_seen[plan.poison_index] == 1).all()
    assert torch.equal(plan.labels_seen[plan.cover_index], LABELS[plan.cover_index])
    assert len(set(LABELS[plan.cover_index].tolist())) == 10


def test_a_picture_of_the_user_keeps_its_transparency(tmp_path):
    pixels = np.full((32, 32, 4), 255)
    pixels[:, :16, 3] = 0
    path = tmp_path / "half.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    *_, clean, seen = small(image=f"file:{path}", mask_rate=0.0)
    assert torch.equal(seen[..., :16], clean[..., :16])
    expected = clean[..., 16:].float() * 0.8 + 0.2 * 255
    assert (seen[..., 16:] - expected).abs().max() <= 0.5 + 1e-3


def test_other_grids_and_sizes():
    attack = AdaptiveBlend(grid=7, image="noise")
    trigger = attack.make_trigger((224, 224))
    plan = attack.plan(LABELS[:60], 10)
    clean = torch.zeros(len(plan.touched_index), 3, 224, 224, dtype=torch.uint8)
    changed = (attack.poison_rows(clean, plan, trigger) != 0).any(1)
    assert len(clean) == 4
    assert (changed.sum((1, 2)) == (49 - 24) * 32 * 32).all()


def test_describe_names_what_defines_the_attack():
    described = AdaptiveBlend(alpha_train=0.15).describe()
    own = {"cover_rate", "grid", "mask_rate", "alpha_train", "alpha_test", "image", "image_seed"}
    assert own < described.keys()
    assert described["alpha_train"] == 0.15
    assert described["alpha_test"] == 0.2
