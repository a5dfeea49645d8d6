"""WaNet against its formulas, golden numbers, and the counts of both modes."""

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from bdclean.attacks import Trigger, WaNet
from bdclean.attacks import trigger as trigger_module
from bdclean.attacks.wanet import draw_field, draw_jitter
from bdclean.cli import main
from bdclean.data import Digits, Splits
from bdclean.data.poisoning import poisoned_rows
from bdclean.functional.seeds import derive_seed
from bdclean.types import View

H = 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(count: int = 6, size: int = H) -> Tensor:
    return torch.rand(count, 3, size, size, generator=generator(1))


def stored(count: int) -> Tensor:
    shape = (count, 3, H, H)
    return torch.randint(0, 256, shape, generator=generator(2), dtype=torch.uint8)


def identity(size: int) -> Tensor:
    """I[r, c] = (x_c, y_r)."""
    place = (-1 + 2 * torch.arange(size, dtype=torch.float64) / (size - 1)).float()
    return torch.stack([place.expand(size, size), place[:, None].expand(size, size)], -1)[None]


def psnr(images: Tensor, others: Tensor) -> float:
    return 10 * torch.log10(1 / (images - others).pow(2).mean((1, 2, 3))).mean().item()


# ------------------------------------------------------------------ the warp


def test_the_field_has_the_golden_values():
    field = draw_field(32, 4, generator(0))
    assert field.shape == (1, 32, 32, 2)
    assert field[0, 0, 0].tolist() == pytest.approx([-0.015992, 0.844446], abs=1e-4)
    assert field[0, 16, 16].tolist() == pytest.approx([0.198871, 1.400024], abs=1e-4)


@pytest.mark.parametrize("points", [2, 4, 7])
def test_the_field_meets_the_control_points_in_the_corners(points):
    control = torch.rand(1, 2, points, points, generator=generator(3)) * 2 - 1
    control /= control.abs().mean()
    field = draw_field(32, points, generator(3)).permute(0, 3, 1, 2)
    corners = (slice(None), slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    torch.testing.assert_close(field[corners], control[corners], atol=1e-5, rtol=0)
    same_size = draw_field(points, points, generator(3))
    assert same_size.abs().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("strength", "rescale", "points"), [(0.5, 1.0, 4), (2.0, 0.9, 5), (0.3, 1.7, 3)]
)
def test_the_grid_is_its_formula(strength, rescale, points):
    attack = WaNet(strength=strength, grid_size=points, grid_rescale=rescale, grid_seed=5)
    grid = attack.make_trigger(24).grid
    field = draw_field(24, points, generator(derive_seed("wanet", 5)))
    expected = ((identity(24) + strength * field / 24) * rescale).clamp(-1, 1)
    torch.testing.assert_close(grid, expected, atol=1e-6, rtol=0)
    assert grid.min() >= -1
    assert grid.max() <= 1


def test_reading_is_bilinear_between_pixel_centres():
    trigger = WaNet(strength=3.0).make_trigger(8)
    images = floats(2, 8).double()
    out = trigger.stamp(images)
    for r in range(8):
        for c in range(8):
            x, y = ((trigger.grid[0, r, c].double() + 1) / 2 * 7).tolist()
            left, top = min(int(x), 6), min(int(y), 6)
            u, v = x - left, y - top
            upper = (1 - u) * images[..., top, left] + u * images[..., top, left + 1]
            lower = (1 - u) * images[..., top + 1, left] + u * images[..., top + 1, left + 1]
            expected = (1 - v) * upper + v * lower
            torch.testing.assert_close(out[..., r, c], expected, atol=1e-12, rtol=0)


def test_without_strength_nothing_moves():
    trigger = WaNet(strength=0.0).make_trigger(H)
    images = stored(6)
    assert (trigger(images / 255) - images / 255).abs().max() <= 1e-5
    assert torch.equal(trigger.poison(images), images)


def test_constant_images_stay():
    levels = torch.arange(256) / 255
    images = levels[:, None, None, None].expand(-1, 3, H, H)
    trigger = WaNet(strength=2.0).make_trigger(H)
    assert (trigger.stamp(images) - images).abs().max() <= 1e-6
    assert torch.equal(WaNet(quantize="floor").make_trigger(H).as_stored(images), images)


def test_the_warp_commutes_with_normalisation():
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.247, 0.2435, 0.2616]).view(3, 1, 1)
    trigger, images = WaNet().make_trigger(H), floats().double()
    difference = trigger.stamp((images - mean) / std) - (trigger.stamp(images) - mean) / std
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize("size", [32, 64, 224])
def test_pixels_move_by_less_than_one_whatever_the_size(size):
    moves = []
    for seed in range(10):
        grid = WaNet(grid_seed=seed).make_trigger(size).grid
        moves.append(((grid - identity(size)) * (size - 1) / 2).norm(dim=-1))
    assert max(move.max() for move in moves) < 1
    assert torch.stack(moves).mean().item() == pytest.approx(0.28, abs=0.03)


def test_ramps_show_the_displacement():
    trigger = WaNet().make_trigger(H)
    ramp = (torch.arange(H) / (H - 1)).expand(H, H)
    out = trigger(torch.stack([ramp, ramp.T, ramp * 0]))
    torch.testing.assert_close(out[0], (trigger.grid[0, ..., 0] + 1) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1], (trigger.grid[0, ..., 1] + 1) / 2, atol=1e-6, rtol=0)


def test_psnr_of_trigger_and_noise():
    """On a photograph reduced until its detail is that of CIFAR-10 images."""
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((96, 64))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
    tiles = pixels.unfold(1, H, H).unfold(2, H, H).permute(1, 2, 0, 3, 4).reshape(-1, 3, H, H)
    for seed in range(5):
        trigger = WaNet(grid_seed=seed).make_trigger(H)
        noise = trigger.noise(tiles, draw_jitter(len(tiles), H, generator(seed)))
        assert 29 < psnr(trigger(tiles), tiles) < 34
        assert 26 < psnr(noise, tiles) < 29


def test_trigger_is_deterministic_and_noise_is_not():
    trigger, images = WaNet().make_trigger(H), floats()
    assert torch.equal(trigger(images), trigger(images))
    source = generator(4)
    draws = [trigger.noise(images, draw_jitter(6, H, source)) for _ in range(2)]
    assert not torch.equal(*draws)
    again = trigger.noise(images, draw_jitter(6, H, generator(4)))
    assert torch.equal(again, draws[0])


def test_noise_is_the_trigger_grid_with_jitter():
    trigger, images = WaNet().make_trigger(H), floats()
    jitter = draw_jitter(6, H, generator(4))
    assert jitter.min() < -0.99
    assert jitter.max() > 0.99
    assert jitter.mean().abs() < 0.02
    for image, own, found in zip(images, jitter, trigger.noise(images, jitter), strict=True):
        grid = (trigger.grid + own / H).clamp(-1, 1)
        expected = torch.nn.functional.grid_sample(image[None], grid, align_corners=True)[0]
        assert torch.equal(found, expected.clamp(0, 1))
    assert torch.equal(trigger.noise(images, torch.zeros_like(jitter)), trigger(images))


def test_autocast_and_low_precision_images():
    trigger, images = WaNet().make_trigger(H), floats()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trigger(images), trigger(images.float()))
        assert trigger(images).dtype == torch.float32
    half = images.bfloat16()
    assert trigger(half).dtype == torch.bfloat16
    assert torch.equal(trigger(half), trigger(half.float()).bfloat16())


def test_warps_of_other_seeds_differ_and_selection_has_its_own_seed():
    grid = WaNet().make_trigger(H).grid
    assert torch.equal(WaNet(seed=1).make_trigger(H).grid, grid)
    assert not torch.equal(WaNet(grid_seed=1).make_trigger(H).grid, grid)


def test_a_loaded_trigger_gives_the_same_noise(tmp_path):
    trigger, images = WaNet().make_trigger(H), floats()
    trigger.save(tmp_path / "trigger.safetensors")
    loaded = Trigger.load(tmp_path / "trigger.safetensors")
    assert torch.equal(loaded.grid, trigger.grid)
    jitter = draw_jitter(6, H, generator())
    assert torch.equal(loaded.noise(images, jitter), trigger.noise(images, jitter))


# ------------------------------------------------------------------ dynamic mode


def poisoned_batch(attack: WaNet, count: int = 128, first: int = 0, seed: int = 0):
    images = floats(count).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count) % 10
    before, old = images.clone(), labels.clone()
    trigger = attack.make_trigger(H)
    out, seen = attack.poison_batch(images, labels, trigger, 10, first, generator(seed))
    assert torch.equal(images, before)
    assert torch.equal(labels, old)
    assert out.is_contiguous(memory_format=torch.channels_last)
    return images, labels, trigger, out, seen


@pytest.mark.parametrize(
    ("rate", "size", "ratio", "poison", "cover"),
    [
        (0.1, 128, 2, 12, 24),  # BCU
        (0.06, 128, 2, 7, 14),  # CBD
        (0.1, 80, 2, 8, 16),
        (0.1, 5, 2, 0, 0),
        (0.06, 128, 1.5, 7, 10),
        (1.0, 8, 0, 8, 0),
        (0.5, 9, 1, 4, 4),
    ],
)
def test_counts_of_the_public_code(rate, size, ratio, poison, cover):
    attack = WaNet(rate=rate, cross_ratio=ratio, exact=False)
    assert attack.batch_counts(size, 0) == (poison, cover)
    assert attack.batch_counts(size, 640) == (poison, cover)


@pytest.mark.parametrize("ratio", ["0", "1", "2", "2.4"])
@pytest.mark.parametrize("rate", ["0.06", "0.1", "0.29", "0.003", "0.2857"])
@pytest.mark.parametrize(("total", "size"), [(50_000, 128), (1000, 7), (301, 64), (97, 1)])
def test_exact_counts_add_up_over_the_epoch(rate, ratio, total, size):
    attack = WaNet(rate=float(rate), cross_ratio=float(ratio))
    poison = cover = 0
    for first in range(0, total, size):
        batch = min(size, total - first)
        p, c = attack.batch_counts(batch, first)
        assert p >= 0
        assert c >= 0
        assert p + c <= batch
        poison, cover = poison + p, cover + c
        assert poison == math.floor(Fraction(rate) * (first + batch))
    assert cover - Fraction(rate) * Fraction(ratio) * total < 1
    assert Fraction(rate) * Fraction(ratio) * total - cover < 1


def test_exact_counts_of_cifar10():
    attack = WaNet(rate=0.06)
    batches = [attack.batch_counts(min(128, 50_000 - i), i) for i in range(0, 50_000, 128)]
    assert [sum(counts) for counts in zip(*batches, strict=True)] == [3_000, 6_000]
    assert {p for p, _ in batches[:-1]} == {7, 8}


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_exact_counts_leave_no_image_clean_when_asked(rate):
    attack = WaNet(rate=rate, cross_ratio=1 / rate - 1)
    poison, cover = zip(*(attack.batch_counts(1, i) for i in range(10)), strict=True)
    assert sum(poison) == 10 * rate
    assert sum(cover) == 10 - 10 * rate
    assert all(p + c == 1 for p, c in zip(poison, cover, strict=True))


@pytest.mark.parametrize(("exact", "poison", "cover"), [(False, 7, 14), (True, 8, 15)])
def test_the_front_of_a_batch_is_poisoned(exact, poison, cover):
    attack = WaNet(target=6, rate=0.06, exact=exact)
    images, labels, trigger, out, seen = poisoned_batch(attack, first=128, seed=9)
    assert attack.batch_counts(128, 128) == (poison, cover)
    both = poison + cover
    assert torch.equal(out[:poison], trigger.as_stored(trigger(images[:poison])))
    noise = trigger.noise(images[poison:both], draw_jitter(cover, H, generator(9)))
    assert torch.equal(out[poison:both], trigger.as_stored(noise))
    assert torch.equal(out[both:], images[both:])
    assert (seen[:poison] == 6).all()
    assert torch.equal(seen[poison:], labels[poison:])


def test_noise_of_a_batch_is_drawn_per_image_and_from_the_generator_alone():
    attack = WaNet()
    trigger, labels = attack.make_trigger(H), torch.zeros(20, dtype=torch.int64)
    images = floats(1).expand(20, -1, -1, -1)

    def poison(seed: int) -> Tensor:
        return attack.poison_batch(images, labels, trigger, 10, 0, generator(seed))[0]

    torch.manual_seed(0)
    first = poison(1)
    torch.manual_seed(1)
    assert torch.equal(poison(1), first)
    other = poison(2)
    assert torch.equal(other[:2], first[:2])  # the trigger
    assert not torch.equal(other[2:6], first[2:6])
    assert len(torch.unique(first.flatten(1), dim=0)) == 1 + 4 + 1


def test_all_to_all_moves_labels_on_by_one():
    _, labels, _, _, seen = poisoned_batch(WaNet(label_rule="all_to_all", exact=False))
    assert torch.equal(seen[:12], (labels[:12] + 1) % 10)
    assert (seen[9], labels[9]) == (0, 9)
    assert torch.equal(seen[12:], labels[12:])


def test_a_batch_too_small_for_poison_stays_clean():
    images, labels, _, out, seen = poisoned_batch(WaNet(exact=False), count=5)
    assert torch.equal(out, images)
    assert torch.equal(seen, labels)
    assert out is not images


def test_dynamic_plan_touches_no_row():
    plan = WaNet().plan(torch.arange(1000) % 10, 10)
    assert len(plan.touched_index) == 0
    assert torch.equal(plan.labels_seen, plan.labels_true)
    assert WaNet().dynamic
    assert not WaNet(mode="static").dynamic


def test_an_epoch_of_training_has_the_rate_and_repeats():
    data = Digits(attack=WaNet(rate=0.06, target=3), splits=Splits(val=50), shuffle_seed=4)
    data.set_view(View("train", batch_size=100, labels=True))

    def epoch() -> list[dict[str, Tensor]]:
        return [data.on_after_batch_transfer(dict(b), 0) for b in data.train_dataloader()]

    batches = epoch()
    clean = data.base.images[data.rows.train] / 255
    touched = [(b["image"] != clean[b["index"]]).any(3).any(2).any(1) for b in batches]
    n = len(clean)
    assert sum(int(t.sum()) for t in touched) == pytest.approx(0.18 * n, abs=1)
    changed = [b["label"] != data.base_labels[data.rows.train][b["index"]] for b in batches]
    assert 0 < sum(int(c.sum()) for c in changed) <= math.floor(0.06 * n)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, epoch(), strict=True))


# ------------------------------------------------------------------ static mode

STATIC = WaNet(target=1, rate=0.05, mode="static", cross_ratio=1.0)
LABELS = torch.arange(50_000) % 10


def test_static_plan_of_cifar10():
    plan = STATIC.plan(LABELS, 10)
    assert (len(plan.poison_index), len(plan.cover_index)) == (2_500, 2_500)
    assert not torch.isin(plan.poison_index, plan.cover_index).any()
    assert (plan.labels_seen[plan.poison_index] == 1).all()
    others = torch.ones(50_000, dtype=torch.bool)
    others[plan.poison_index] = False
    assert torch.equal(plan.labels_seen[others], LABELS[others])


def test_static_plan_all_to_all():
    plan = WaNet(mode="static", label_rule="all_to_all").plan(LABELS, 10)
    assert len(plan.cover_index) == 2 * len(plan.poison_index) == 10_000
    moved = (LABELS[plan.poison_index] + 1) % 10
    assert torch.equal(plan.labels_seen[plan.poison_index], moved)
    assert torch.equal(plan.labels_seen[plan.cover_index], LABELS[plan.cover_index])


def test_static_rows_are_trigger_and_noise():
    plan, trigger = STATIC.plan(LABELS[:400], 10), STATIC.make_trigger(H)
    one = stored(1)
    rows = one.expand(len(plan.touched_index), -1, -1, -1)
    out = STATIC.poison_rows(rows, plan, trigger)
    covers = torch.isin(plan.touched_index, plan.cover_index)
    assert torch.equal(out[~covers], trigger.poison(rows[~covers]))
    looks = torch.cat([out[covers], one, trigger.poison(one)])
    assert len(torch.unique(looks.flatten(1), dim=0)) == int(covers.sum()) + 2  # jitter per image
    distance = (out[covers].int() - trigger.poison(rows[covers]).int()).abs().float().mean()
    clean = (out[covers].int() - rows[covers].int()).abs().float().mean()
    assert 0 < distance < clean  # jitter around the trigger grid, not around the identity


def test_static_noise_is_a_function_of_the_attacks_seed():
    trigger, rows = STATIC.make_trigger(H), stored(40)
    plan = STATIC.plan(LABELS[:400], 10)
    torch.manual_seed(0)
    out = STATIC.poison_rows(rows, plan, trigger)
    torch.manual_seed(1)
    assert torch.equal(STATIC.poison_rows(rows, plan, trigger), out)
    other = WaNet(target=1, rate=0.05, mode="static", cross_ratio=1.0, seed=1)
    covers = torch.isin(plan.touched_index, plan.cover_index)
    differ = (other.poison_rows(rows, plan, trigger) != out).any(3).any(2).any(1)
    assert torch.equal(differ, covers)


def test_chunks_do_not_change_the_noise(monkeypatch):
    trigger, rows = STATIC.make_trigger(H), stored(40)
    plan = STATIC.plan(LABELS[:400], 10)
    out = STATIC.poison_rows(rows, plan, trigger)
    monkeypatch.setattr(trigger_module, "_CHUNK_VALUES", 7 * 3 * H * H)
    assert torch.equal(STATIC.poison_rows(rows, plan, trigger), out)


def test_static_rows_do_not_depend_on_the_training_seed():
    first, second = (
        Digits(attack=STATIC, splits=Splits(val=50), shuffle_seed=seed) for seed in (0, 1)
    )
    assert first.plan.hash == second.plan.hash
    images = [d.role_images("train", labels=True).__getitems__(range(500)) for d in (first, second)]
    assert torch.equal(images[0]["image"], images[1]["image"])
    clean = first.base.images[first.rows.train[:500]]
    touched = (images[0]["image"] != clean).any(3).any(2).any(1).nonzero().flatten()
    assert torch.equal(touched, first.plan.touched_index[first.plan.touched_index < 500])


def test_static_poisoning_of_50000_images_takes_under_two_seconds():
    images = torch.zeros(50_000, 3, H, H, dtype=torch.uint8)
    trigger = STATIC.make_trigger(H)
    start = time.thread_time()
    plan = STATIC.plan(LABELS, 10)
    overlay = poisoned_rows(STATIC, plan, trigger, images[plan.touched_index], 10)
    assert time.thread_time() - start < 2
    assert len(overlay.images) == 5_000


# ------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_noise_accuracy_is_about_all_test_images_and_true_labels(mode):
    attack, images, labels = WaNet(mode=mode), stored(30), torch.arange(30) % 10
    trigger = attack.make_trigger(H)
    (name, test), *more = attack.further_tests(images, labels, trigger).items()
    assert (name, more) == ("noise_acc", [])
    assert torch.equal(test.rows, torch.arange(30))
    assert torch.equal(test.wanted, labels)
    again = attack.further_tests(images, labels, trigger)["noise_acc"]
    assert torch.equal(test.images, again.images)
    for other in (images, trigger.poison(images)):
        assert (test.images != other).any(3).any(2).any(1).all()
    changed = WaNet(mode=mode, seed=1).further_tests(images, labels, trigger)["noise_acc"]
    assert not torch.equal(changed.images, test.images)


def test_triggered_test_images_are_served_without_jitter():
    data = Digits(attack=WaNet(target=2), splits=Splits(val=50))
    clean, triggered, noise = (list(loader) for loader in data.test_dataloader())
    clean = {k: torch.cat([b[k] for b in clean]) for k in clean[0]}
    triggered = {k: torch.cat([b[k] for b in triggered]) for k in triggered[0]}
    rows = clean["label"] != 2
    assert torch.equal(triggered["image"], data.trigger.poison(clean["image"][rows]))
    assert torch.equal(torch.cat([b["target"] for b in noise]), clean["label"])
    assert data.further_tests == ("noise_acc",)


@pytest.mark.filterwarnings("ignore")
def test_a_run_from_the_files(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    stack = ["trainer/cpu", "data/digits", "attack/wanet", "train/wanet"]
    words = [word for name in stack for word in ("-c", f"{root}/configs/{name}.yaml")]
    main(["fit", *words, "--model.width", "4", "--trainer.max_epochs", "1", "--run", "run"])
    record = json.loads(Path("run/result.json").read_text())
    assert 0 <= record["metrics"]["noise_acc"] <= 100
    assert record["metrics"]["n_noise_acc"] == record["metrics"]["n_clean"]
    assert record["data"]["dynamic"] is True
    assert record["data"]["num_poisoned"] == 0
    own = ("mode", "strength", "grid_size", "grid_rescale", "grid_seed", "cross_ratio", "exact")
    described = {name: record["data"]["attack"][name] for name in own}
    assert described == {
        "mode": "dynamic",
        "strength": 0.5,
        "grid_size": 4,
        "grid_rescale": 1.0,
        "grid_seed": 0,
        "cross_ratio": 2.0,
        "exact": True,
    }
    saved = Trigger.load("run/trigger.safetensors")
    assert torch.equal(saved.grid, WaNet().make_trigger(H).grid)
