"""The physical transformations against torchvision, and who meets them."""

import json
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomAffine

from bdclean.attacks import BadNets, PhysicalBA
from bdclean.cli import main
from bdclean.data import Digits, Splits
from bdclean.data.augment import augment, physical
from bdclean.data.augment.physical import Motion
from bdclean.types import View


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _affine_oracle(image: Tensor, angle: float, right: int, down: int, scale: float) -> Tensor:
    mode = RandomAffine(10).interpolation
    assert mode == InterpolationMode.NEAREST
    return tv.affine(image, angle, [right, down], scale, [0.0, 0.0], mode, fill=[0.0] * 3)


@pytest.mark.parametrize("size", [(32, 32), (20, 33), (64, 48)])
def test_move_is_torchvisions_affine(size):
    images = torch.rand(64, 3, *size, generator=_generator())
    u = torch.rand(4, 64, generator=_generator(1))
    motion = Motion(20 * u[0] - 10, (6 * u[1] - 3).round(), (6 * u[2] - 3).round(), 0.8 + u[3] / 10)
    result = physical.move(images, motion)
    wrong = 0
    for row, image in enumerate(images):
        angle, right, down, scale = (float(field[row]) for field in motion)
        expected = _affine_oracle(image, angle, int(right), int(down), scale)
        wrong += (result[row] != expected).any(0).sum().item()
    assert wrong <= 1e-3 * 64 * size[0] * size[1]  # float32 ties between two pixels


def test_the_signs_of_the_motion():
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, 6] = 1  # two pixels to the right of the centre
    zero, one = torch.zeros(1), torch.ones(1)

    def spot(angle: Tensor = zero, right: Tensor = zero, down: Tensor = zero) -> list[int]:
        moved = physical.move(image, Motion(angle, right, down, one))
        return moved[0, 0].nonzero().flatten().tolist()

    assert spot() == [4, 6]
    assert spot(right=2 * one) == [4, 8]
    assert spot(down=one) == [5, 6]
    assert spot(angle=90 * one) == [6, 4]  # clockwise


def test_jitter_is_torchvisions_in_both_orders():
    images = torch.rand(40, 3, 8, 8, generator=_generator())
    brightness = 0.8 + 0.4 * torch.rand(40, generator=_generator(1))
    contrast = 0.8 + 0.4 * torch.rand(40, generator=_generator(2))
    first = torch.arange(40) % 2 == 0
    brightness[:2], contrast[:2] = 1.2, 0.8  # clipped, so that the order matters
    result = physical.brightness_contrast(images, brightness, contrast, first)
    orders = set()
    for row, image in enumerate(images):
        b, c = brightness[row].item(), contrast[row].item()
        lit_first = tv.adjust_contrast(tv.adjust_brightness(image, b), c)
        lit_last = tv.adjust_brightness(tv.adjust_contrast(image, c), b)
        expected = lit_first if first[row] else lit_last
        torch.testing.assert_close(result[row], expected, atol=1e-5, rtol=0)
        orders.add((lit_first - lit_last).abs().max().item() > 1e-3)
    assert True in orders  # the oracle can tell the orders apart


def test_physical_composes_flip_jitter_and_motion():
    images = torch.rand(32, 3, 32, 32, generator=_generator())
    result = augment("physical", images, _generator(9))
    u = torch.rand(8, 32, generator=_generator(9))
    wrong, flips = 0, 0
    for row, image in enumerate(images):
        flip, bright, contrast, order, angle, right, down, scale = u[:, row].tolist()
        x = tv.hflip(image) if flip < 0.5 else image
        steps = [
            lambda y, f=0.8 + 0.4 * bright: tv.adjust_brightness(y, f),
            lambda y, f=0.8 + 0.4 * contrast: tv.adjust_contrast(y, f),
        ]
        for step in steps if order < 0.5 else reversed(steps):
            x = step(x)
        shift = [round(3.2 * (2 * v - 1)) for v in (right, down)]
        x = _affine_oracle(x, 20 * angle - 10, *shift, 0.8 + 0.1 * scale)
        wrong += ((result[row] - x).abs() > 1e-4).any(0).sum().item()
        flips += flip < 0.5
    assert wrong <= 1e-3 * 32 * 1024
    assert 0 < flips < 32


def test_ranges_of_the_draws(monkeypatch):
    seen = {}
    jitter, move = physical.brightness_contrast, physical.move
    monkeypatch.setattr(
        physical,
        "brightness_contrast",
        lambda x, b, c, first: (seen.update(b=b, c=c, first=first), jitter(x, b, c, first))[1],
    )
    monkeypatch.setattr(physical, "move", lambda x, m: (seen.update(m=m), move(x, m))[1])
    physical.physical(torch.zeros(1_500, 3, 20, 40), _generator(), 0.5)
    expected = [
        (seen["b"], 0.8, 1.2),
        (seen["c"], 0.8, 1.2),
        (seen["m"].angle, -10, 10),
        (seen["m"].right, -4, 4),
        (seen["m"].down, -2, 2),
        (seen["m"].scale, 0.8, 0.9),
    ]
    for values, low, high in expected:
        assert values.min().item() == pytest.approx(low, abs=0.02 * (high - low))
        assert values.max().item() == pytest.approx(high, abs=0.02 * (high - low))
    assert seen["first"].float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert set(seen["m"].right.tolist()) == set(range(-4, 5))


def test_flip_rate():
    images = torch.zeros(2_000, 3, 8, 32)
    images[..., :16] = 1
    for rate in (0.0, 0.5):
        result = physical.physical(images, _generator(), rate)
        left, right = (half.mean((1, 2, 3)) for half in result.chunk(2, dim=3))
        assert (right > left).float().mean().item() == pytest.approx(rate, abs=0.04)


def test_at_identity_parameters_it_is_badnets(monkeypatch):
    monkeypatch.setattr(physical, "JITTER", 0.0)
    monkeypatch.setattr(physical, "DEGREES", 0.0)
    monkeypatch.setattr(physical, "SHIFT", 0.0)
    monkeypatch.setattr(physical, "SCALE", (1.0, 1.0))
    images = torch.rand(16, 3, 32, 32, generator=_generator())
    poisons = PhysicalBA(image="white_square").make_trigger((32, 32))(images)
    result = physical.physical(poisons, _generator(), 0.0)
    assert torch.allclose(
        result, BadNets(pattern="white").make_trigger((32, 32))(images), atol=1e-6
    )


# --- who meets them ---


def _fetch(data: Digits, epochs: int = 2) -> tuple[list[Tensor], Tensor]:
    """Images and labels of the train role as a step sees them, in stored order, per epoch."""
    loader = data.train_dataloader()
    shown = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        index = torch.cat([batch["index"] for batch in batches]).argsort()
        shown.append(torch.cat([batch["image"] for batch in batches])[index])
        labels = torch.cat([batch["label"] for batch in batches])[index]
    return shown, labels


def test_apply_to_poison_transforms_the_poisoned_rows_alone_and_anew():
    attack = PhysicalBA(target=1, rate=0.1, apply_to="poison")
    data = Digits(attack=attack, splits=Splits(val=50))
    data.set_view(View("train", "none", batch_size=256, labels=True))
    (first, second), labels = _fetch(data)
    stored = data.role_images("train", labels=True).__getitems__(range(len(labels)))
    kept = stored["image"].float() / 255
    plan = data.plan
    assert torch.equal(first[plan.clean_index], kept[plan.clean_index])
    assert torch.equal(second[plan.clean_index], kept[plan.clean_index])
    for a, b in ((first, kept), (second, kept), (first, second)):
        assert (a != b)[plan.poison_index].flatten(1).any(1).all()
    assert (labels[plan.poison_index] == 1).all()
    _, triggered = data.test_dataloader()
    rows = next(iter(triggered))["image"]
    again = data.trigger.poison(rows)
    assert torch.equal(rows, again)  # the plain patch, not transformed


def test_other_roles_and_scans_are_left_alone():
    attack = PhysicalBA(target=1, rate=0.1, apply_to="poison")
    data = Digits(attack=attack, splits=Splits(defense=200))
    data.set_view(View("defense", "none", batch_size=100))
    batch = next(iter(data.train_dataloader()))
    before = batch["image"].clone()
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], before.float() / 255)
    scanned = next(iter(data.reading_dataloader(View("train", batch_size=2_000))))
    poisons = data.plan.poison_index
    clean = data.stored.images[data.rows.train][poisons]
    assert torch.equal(scanned["image"][poisons], data.trigger.poison(clean))


def test_apply_to_all_is_the_augmentation_of_the_training():
    data = Digits(attack=PhysicalBA(target=1, rate=0.1), splits=Splits(val=50))
    data.set_view(View("train", "physical", batch_size=256, labels=True))
    (first, second), labels = _fetch(data)
    changed = (first != second).flatten(1).any(1)
    assert changed.all()
    assert (labels[data.plan.poison_index] == 1).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("attack", "method"),
    [
        ("tact/advrbd", "supervised/physical"),
        ("adaptive_patch/toolbox", "supervised/fast"),
    ],
)
def test_the_presets_train_and_are_recorded(attack, method, tmp_path, monkeypatch):
    root = Path(__file__).parents[3]
    monkeypatch.chdir(tmp_path)
    stack = ["trainer/cpu", "data/digits", f"attack/{attack}", f"train/{method}"]
    words = [word for name in stack for word in ("-c", f"{root}/configs/{name}.yaml")]
    main(["fit", *words, "--run", "run", "--model.width", "4", "--trainer.max_epochs", "1"])
    record = json.loads(Path("run/result.json").read_text())
    described = record["data"]["attack"]
    assert described["attack"].lower() == attack.split("/")[0].replace("_", "")
    assert record["data"]["num_poisoned"] > 0
    assert record["data"]["num_covers"] > 0
    assert ("leak" in record["metrics"]) == (attack == "tact/advrbd")
