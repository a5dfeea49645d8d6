"""PhysicalBA: the patch, and the counts. Its transformations: tests/data/test_physical.py."""

import torch

from bdclean.attacks import BadNets, PhysicalBA
from bdclean.attacks.assets_patches import patch

LABELS = torch.arange(50_000) % 10


def stored(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8)


def test_only_the_137_pixels_of_the_logo_change():
    images = stored()
    out = PhysicalBA().make_trigger((32, 32)).poison(images)
    picture, mask = patch("logo", (32, 32))
    inside = mask[0].bool()
    assert torch.equal(out[..., ~inside], images[..., ~inside])
    levels = (picture * 255).round()[:, inside]
    assert torch.equal(out[..., inside].float(), levels.expand(4, -1, -1))
    assert inside.sum() == 137


def test_without_transformations_it_is_badnets():
    images = stored()
    physical = PhysicalBA(image="white_square").make_trigger((32, 32))
    badnets = BadNets(pattern="white").make_trigger((32, 32))
    assert torch.equal(physical.poison(images), badnets.poison(images))
    floats = images.float() / 255
    assert torch.equal(physical(floats), badnets(floats))


def test_twice_is_once():
    trigger = PhysicalBA().make_trigger((32, 32))
    once = trigger.poison(stored())
    assert torch.equal(trigger.poison(once), once)


def test_2500_images_of_all_classes_get_label_1():
    plan = PhysicalBA(target=1, rate=0.05).plan(LABELS, 10)
    assert len(plan.poison_index) == 2_500
    assert len(plan.cover_index) == 0
    assert (plan.labels_seen[plan.poison_index] == 1).all()
    assert (LABELS[plan.poison_index].bincount() > 150).all()


def test_who_is_transformed_is_the_choice_of_apply_to():
    assert PhysicalBA().poison_augmentation == "none"
    assert PhysicalBA(apply_to="poison").poison_augmentation == "physical"
    assert PhysicalBA(apply_to="poison").plan(LABELS, 10).hash == PhysicalBA().plan(LABELS, 10).hash


def test_describe_names_what_defines_the_attack():
    described = PhysicalBA(image="file:/somewhere/own.png", apply_to="poison").describe()
    assert described["attack"] == "PhysicalBA"
    assert described["image"] == "file:own.png"
    assert described["apply_to"] == "poison"
