"""The label-consistent attack without its surrogate: patches, labels, amplitude, arguments."""

import pytest
import torch

from bdclean.attacks import BadNets, LabelConsistent
from bdclean.errors import AttackError
from bdclean.functional.pgd import PGD

RIGHT = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
LEFT = [[255, 0, 0], [0, 255, 0], [255, 0, 255]]  # RIGHT, mirrored
LABELS = torch.arange(1000) % 10


def stored(count: int = 4, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 255, (count, 3, size, size), generator=generator).to(torch.uint8)


def test_a_single_patch_is_the_trigger_of_badnets():
    arguments = {"pattern": "checker", "position": "center", "patch_size": 6}
    ours = LabelConsistent(**arguments).make_trigger((32, 32))
    assert ours.fingerprint == BadNets(**arguments).make_trigger((32, 32)).fingerprint


@pytest.mark.parametrize(("patch", "left"), [("corners4", LEFT), ("corners4_same", RIGHT)])
def test_four_corners_are_the_published_arrays(patch, left):
    images = stored()
    expected = images.clone()
    for rows in (slice(0, 3), slice(29, 32)):
        expected[:, :, rows, :3] = torch.tensor(left, dtype=torch.uint8)
        expected[:, :, rows, 29:] = torch.tensor(RIGHT, dtype=torch.uint8)
    trigger = LabelConsistent(patch=patch, position="center").make_trigger((32, 32))
    assert torch.equal(trigger.poison(images), expected)
    assert trigger.mask.sum() == 36


def test_only_the_mirrored_corners_survive_a_flip():
    mirrored = LabelConsistent(patch="corners4").make_trigger((32, 32))
    same = LabelConsistent(patch="corners4_same").make_trigger((32, 32))
    assert torch.equal(mirrored.mask, mirrored.mask.flip(-1))
    assert torch.equal(mirrored.pattern, mirrored.pattern.flip(-1))
    assert not torch.equal(same.pattern, same.pattern.flip(-1))
    assert torch.equal(same.mask, mirrored.mask)


def test_labels_stay_and_only_the_target_class_is_touched():
    plan = LabelConsistent(target=6, rate=0.6).plan(LABELS, 10)
    assert torch.equal(plan.labels_seen, LABELS)
    assert len(plan.poison_index) == 60
    assert (LABELS[plan.poison_index] == 6).all()
    assert len(plan.cover_index) == 0


@pytest.mark.parametrize("patch", ["single", "corners4"])
@pytest.mark.parametrize("amplitude", [16, 64, 200])
def test_reduced_amplitude_shifts_the_patch_and_clips(patch, amplitude):
    attack = LabelConsistent(patch=patch, amplitude=amplitude / 255, target=6)
    trigger = attack.make_trigger((32, 32))
    images = stored(60)
    out = attack.poison_rows(images, attack.plan(LABELS, 10), trigger)
    sign = torch.where(trigger.pattern > 0.5, 1, -1) * trigger.mask
    expected = (images.long() + amplitude * sign).clamp(0, 255)
    assert torch.equal(out.long(), expected)


def test_the_amplitude_changes_no_test_image():
    faint, full = LabelConsistent(amplitude=0.1), LabelConsistent()
    assert faint.make_trigger((32, 32)).fingerprint == full.make_trigger((32, 32)).fingerprint
    plan, images = full.plan(LABELS, 10), stored(60)
    stamped = full.make_trigger((32, 32)).poison(images)
    assert torch.equal(full.poison_rows(images, plan, full.make_trigger((32, 32))), stamped)


def test_what_it_asks_of_the_data_module():
    attack = LabelConsistent(surrogate="net.safetensors", epsilon=8, pgd_steps=100, step_size=1.5)
    wanted = PGD(8, 100, 1.5, "pixel255", "linf", random_start=False)
    assert attack.adversarial.pgd == wanted
    assert attack.adversarial.surrogate == "net.safetensors"
    assert LabelConsistent(epsilon=0).adversarial is None
    assert BadNets().adversarial is None


def test_describe_names_what_defines_the_attack_and_no_path():
    facts = LabelConsistent(target=6, surrogate="/home/me/net.safetensors").describe()
    assert facts == {
        "attack": "LabelConsistent",
        "target": 6,
        "rate": 0.6,
        "rate_base": "target_class",
        "label_rule": "clean_label",
        "exclude_target": False,
        "seed": 0,
        "quantize": "round",
        "epsilon": 16.0,
        "pgd_steps": 7,
        "step_size": 4.0,
        "step_unit": "pixel255",
        "patch": "single",
        "pattern": "bw_anp",
        "position": "top_left",
        "patch_size": 3,
        "amplitude": 1.0,
    }
    assert LabelConsistent(patch="corners4").describe()["position"] is None


def test_the_surrogate_does_not_change_the_plan():
    first = LabelConsistent(surrogate="a.safetensors").plan(LABELS, 10)
    assert first.hash == LabelConsistent(surrogate="b.safetensors").plan(LABELS, 10).hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_rule": "all_to_one"}, r"^label_rule=all_to_one: .* clean_label"),
        ({"epsilon": -1.0}, r"^epsilon=-1\.0: it must be 0 or in \[1, 255\]"),
        ({"epsilon": 0.5}, r"^epsilon=0\.5: it must be 0 or in \[1, 255\]"),
        ({"epsilon": float("nan")}, r"^epsilon=nan: .* \[1, 255\]"),
        ({"pgd_steps": 0}, r"^pgd_steps=0: it must be an integer >= 1"),
        ({"step_size": 0.0}, r"^step_size=0\.0: it must be above 0"),
        ({"step_unit": "pixel"}, r"^step_unit=pixel: .* pixel255"),
        ({"patch": "corners"}, r"^patch=corners: .* corners4, corners4_same"),
        ({"pattern": "red"}, r"^pattern=red: .* bw_anp"),
        ({"position": "middle"}, r"^position=middle: .* center"),
        ({"patch_size": 2}, r"^patch_size=2: it must be an integer >= 3"),
        ({"amplitude": 0.0}, r"^amplitude=0\.0: it must be in \(0, 1\]"),
        ({"amplitude": 1.5}, r"^amplitude=1\.5: it must be in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(AttackError, match=message):
        LabelConsistent(**arguments)


def test_corners_that_would_overlap():
    message = r"^patch_size=5: it must be at most 4 .* half the side of an image of 9x9"
    with pytest.raises(AttackError, match=message):
        LabelConsistent(patch="corners4", patch_size=5).make_trigger((9, 9))
