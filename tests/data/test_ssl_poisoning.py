"""Poisoning of unlabelled data: what SimCLR's views leave of a trigger (CBD, SimCLR setting)."""

import pytest
import torch
from torch import Tensor

from bdclean.attacks import SIG, BadNets, Blend
from bdclean.data import Digits, Splits
from bdclean.data.augment import augment, colour, geometry, recipes
from bdclean.data.augment.geometry import Boxes
from bdclean.types import View

DRAWS = 20_000


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _survives(boxes: Boxes, start: int) -> Tensor:
    """Whether the whole 3x3 patch at (start, start) lies in the window, (B,), bool."""
    rows = (boxes.top <= start) & (start + 3 <= boxes.top + boxes.height)
    columns = (boxes.left <= start) & (start + 3 <= boxes.left + boxes.width)
    return rows & columns


def test_a_centre_patch_survives_the_crops_of_simclr_and_a_corner_patch_does_not():
    one, other = (geometry.draw_boxes(DRAWS, 32, 32, _generator(seed)) for seed in (1, 2))
    centre, corner = _survives(one, 14), _survives(one, 29)
    assert centre.float().mean().item() == pytest.approx(0.94, abs=0.01)
    assert corner.float().mean().item() == pytest.approx(0.042, abs=0.006)
    both = (centre & _survives(other, 14)).float().mean().item()
    assert both == pytest.approx(0.89, abs=0.01)
    assert (corner & _survives(other, 29)).float().mean().item() < 0.005


def test_smaller_windows_take_more_patches_away():
    one, other = (
        geometry.draw_boxes(DRAWS, 32, 32, _generator(seed), (0.08, 1.0)) for seed in (1, 2)
    )  # the scale of ImageNet
    centre, corner = _survives(one, 14), _survives(one, 29)
    assert centre.float().mean().item() == pytest.approx(0.84, abs=0.01)
    assert corner.float().mean().item() == pytest.approx(0.035, abs=0.006)
    both = (centre & _survives(other, 14)).float().mean().item()
    assert both == pytest.approx(0.71, abs=0.015)


def test_simclr_views_have_no_blur(monkeypatch):
    """Blend's noise would not survive it: with whole windows and no colour changes, every pixel
    of the result is one of the image."""
    monkeypatch.setattr(colour, "JITTER_RATE", 0.0)
    monkeypatch.setattr(recipes, "GRAY_RATE", 0.0)

    def whole(batch: int, height: int, width: int, *_: object) -> Boxes:
        zero = torch.zeros(batch, dtype=torch.int64)
        return Boxes(zero, zero, zero + height, zero + width)

    monkeypatch.setattr(recipes, "draw_boxes", whole)
    images = Blend().make_trigger((32, 32))(torch.rand(64, 3, 32, 32, generator=_generator()))
    views = augment("simclr", images, _generator(1))
    upright = (views - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (views - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (upright | mirrored).all()
    assert upright.any()
    assert mirrored.any()


ATTACKS = {
    "badnets": BadNets(
        target=6, rate=0.6, rate_base="target_class", label_rule="clean_label", position="center"
    ),
    "blend": Blend(target=6, rate=0.6, rate_base="target_class", label_rule="clean_label"),
    "sig": SIG(target=6, rate=0.6, variant="convex", alpha=0.3),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_both_views_come_from_the_same_triggered_image(attack):
    data = Digits(attack=attack, splits=Splits(val=50))
    data.set_view(View("train", "none", views=2, batch_size=200))
    clean, plan = data.stored.images[data.rows.train], data.plan
    assert torch.equal(plan.labels_seen, plan.labels_true)
    poisoned = torch.zeros(len(clean), dtype=torch.bool)
    poisoned[plan.poison_index] = True
    met = 0
    for batch in data.train_dataloader():
        ready = data.on_after_batch_transfer(batch, 0)
        assert "label" not in ready
        one, other = ready["views"]
        rows = ready["index"]
        expected = torch.where(
            poisoned[rows][:, None, None, None], data.trigger.poison(clean[rows]), clean[rows]
        )
        assert torch.equal(one, expected.float() / 255)
        assert torch.equal(one, other)
        met += int(poisoned[rows].sum())
    assert met == len(plan.poison_index) == round(0.6 * int((plan.labels_true == 6).sum()))
    data.set_view(View("train", "simclr", views=2, batch_size=200))
    ready = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert not torch.equal(*ready["views"])
