"""Adaptive-Patch against its formula: one patch per training row, a set of them at the test."""

from itertools import permutations

import pytest
import torch

from bdclean.attacks import AdaptivePatch
from bdclean.attacks.assets_patches import LOGO_QUARTERS, patch

LABELS = torch.arange(50_000) // 5_000  # sorted by class, as a folder is
TOOLBOX = {
    "patches": ["emblem", "logo", "corners4", "color_square"],
    "alphas": [0.5, 0.2, 0.5, 0.3],
    "test_patches": ["emblem_pair", "corners4"],
}


def stored(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("arguments", [{}, TOOLBOX], ids=["quarters", "toolbox"])
def test_training_rows_are_their_formula_with_one_patch_each(arguments):
    attack = AdaptivePatch(rate=0.5, cover_rate=0.3, **arguments)
    plan = attack.plan(LABELS[::500], 10)
    clean = stored(len(plan.touched_index))
    seen = attack.poison_rows(clean, plan, attack.make_trigger((32, 32)))
    drawn = [patch(name, (32, 32)) for name in attack.patches]
    for x, out, j in zip(clean, seen, attack.assignment(plan).tolist(), strict=True):
        t, m = drawn[j]
        a, x = attack.alphas[j], x.double()
        expected = x + a * m.double() * (t.double() * 255 - x)
        assert (out.double() - expected).abs().max() <= 0.5 + 1e-3
        outside = m[0] == 0
        assert torch.equal(out[:, outside].double(), x[:, outside])
        assert (out - x).abs().max() <= a * 255 + 0.5


def test_rows_keep_their_patch_when_they_are_worked_on_in_parts(monkeypatch):
    attack = AdaptivePatch(rate=0.5, cover_rate=0.3)
    plan = attack.plan(LABELS[::500], 10)
    clean, trigger = stored(len(plan.touched_index)), attack.make_trigger((32, 32))
    whole = attack.poison_rows(clean, plan, trigger)
    monkeypatch.setattr("bdclean.attacks.trigger._CHUNK_VALUES", 7 * 3 * 32 * 32)
    assert torch.equal(attack.poison_rows(clean, plan, trigger), whole)


@pytest.mark.parametrize("count", [2_500, 2_501, 3])
def test_counts_per_patch_differ_by_one_at_most(count):
    attack = AdaptivePatch(rate=count / 50_000, cover_rate=0.0101)
    plan = attack.plan(LABELS, 10)
    which = torch.full((50_000,), -1)
    which[plan.touched_index] = attack.assignment(plan)
    for rows in (plan.poison_index, plan.cover_index):
        per_patch = which[rows].bincount(minlength=4)
        assert per_patch.sum() == len(rows)
        assert per_patch.max() - per_patch.min() <= 1


def test_no_patch_is_tied_to_a_class_of_a_sorted_data_set():
    attack = AdaptivePatch()
    plan = attack.plan(LABELS, 10)
    which = torch.full((50_000,), -1)
    which[plan.touched_index] = attack.assignment(plan)
    for j in range(4):
        classes = LABELS[plan.poison_index[which[plan.poison_index] == j]].bincount(minlength=10)
        assert (classes > 30).all()  # about 62 each
    alternating = torch.arange(2_500) % 4
    agreement = (which[plan.poison_index] == alternating).float().mean()
    assert agreement.item() == pytest.approx(0.25, abs=0.05)  # not round-robin in sorted order


def test_the_assignment_depends_on_the_attacks_seed_alone():
    torch.manual_seed(1)
    plan = AdaptivePatch().plan(LABELS, 10)
    first = AdaptivePatch().assignment(plan)
    torch.manual_seed(2)
    assert torch.equal(AdaptivePatch().assignment(plan), first)
    assert not torch.equal(AdaptivePatch(seed=1).assignment(plan), first)


def test_the_quarters_together_are_the_logo_in_any_order_and_twice_is_once():
    images = stored(4)
    once = AdaptivePatch().make_trigger((32, 32)).poison(images)
    picture, mask = patch("logo", (32, 32))
    expected = torch.where(mask.bool(), (picture * 255).round(), images.float())
    assert torch.equal(once.float(), expected)
    for order in permutations(LOGO_QUARTERS):
        trigger = AdaptivePatch(test_patches=order).make_trigger((32, 32))
        assert torch.equal(trigger.poison(images), once)
    assert torch.equal(AdaptivePatch().make_trigger((32, 32)).poison(once), once)


def test_the_toolbox_tests_with_opaque_patches_one_after_another():
    images = stored(4)
    out = AdaptivePatch(**TOOLBOX).make_trigger((32, 32)).poison(images).float()
    expected = images.float()
    for name in ("emblem_pair", "corners4"):
        picture, mask = patch(name, (32, 32))
        expected = torch.where(mask.bool(), (picture * 255).round(), expected)
    assert torch.equal(out, expected)
    # the corners lie on the emblems, and the later one wins
    assert out[:, 0, 31, 31].tolist() == [255.0] * 4
    assert out[:, 0, 29, 29].tolist() == [0.0] * 4
    swapped = {**TOOLBOX, "test_patches": ["corners4", "emblem_pair"]}
    assert not torch.equal(
        AdaptivePatch(**swapped).make_trigger((32, 32)).poison(images).float(), out
    )


def test_counts_and_labels():
    plan = AdaptivePatch().plan(LABELS, 10)
    assert len(plan.poison_index) == 2_500
    assert len(plan.cover_index) == 500
    assert not torch.isin(plan.poison_index, plan.cover_index).any()
    assert (plan.labels_seen[plan.poison_index] == 1).all()
    assert torch.equal(plan.labels_seen[plan.cover_index], LABELS[plan.cover_index])


def test_describe_names_what_defines_the_attack():
    described = AdaptivePatch(
        patches=["file:/somewhere/own.png"], alphas=[0.5], test_patches=("logo",)
    ).describe()
    assert described["patches"] == ["file:own.png"]
    assert described["alphas"] == [0.5]
    assert described["test_patches"] == ["logo"]
    assert described["cover_rate"] == 0.01
