"""WaNet in training: the dynamic and the static mode, their counts, and the noise test."""

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdclean.attacks import Trigger, WaNet
from bdclean.attacks import trigger as trigger_module
from bdclean.attacks.wanet import draw_jitter
from bdclean.cli import main
from bdclean.data import Digits, Splits
from bdclean.data.poisoning import poisoned_rows
from bdclean.types import BatchPlace, View

H = 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(count: int) -> Tensor:
    return torch.rand(count, 3, H, H, generator=generator(1))


def stored(count: int) -> Tensor:
    shape = (count, 3, H, H)
    return torch.randint(0, 256, shape, generator=generator(2), dtype=torch.uint8)


# ------------------------------------------------------------------ dynamic mode


def poisoned_batch(attack: WaNet, count: int = 128, first: int = 0, seed: int = 0):
    images = floats(count).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count) % 10
    before, old = images.clone(), labels.clone()
    trigger = attack.make_trigger((H, H))
    out, seen = attack.poison_batch(images, labels, trigger, 10, BatchPlace(first), generator(seed))
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
    assert attack.batch_counts(size, BatchPlace()) == (poison, cover)
    assert attack.batch_counts(size, BatchPlace(640)) == (poison, cover)


@pytest.mark.parametrize("ratio", ["0", "1", "2", "2.4"])
@pytest.mark.parametrize("rate", ["0.06", "0.1", "0.29", "0.003", "0.2857"])
@pytest.mark.parametrize(("total", "size"), [(50_000, 128), (1000, 7), (301, 64), (97, 1)])
def test_exact_counts_add_up_over_the_epoch(rate, ratio, total, size):
    attack = WaNet(rate=float(rate), cross_ratio=float(ratio))
    poison = cover = 0
    for first in range(0, total, size):
        batch = min(size, total - first)
        p, c = attack.batch_counts(batch, BatchPlace(first))
        assert p >= 0
        assert c >= 0
        assert p + c <= batch
        poison, cover = poison + p, cover + c
        assert poison == math.floor(Fraction(rate) * (first + batch))
    assert cover - Fraction(rate) * Fraction(ratio) * total < 1
    assert Fraction(rate) * Fraction(ratio) * total - cover < 1


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("devices", [2, 3, 4, 8, 16])
def test_the_shares_of_the_devices_make_the_counts_of_one(exact, devices):
    attack, size = WaNet(rate=0.06, exact=exact), 144
    for before in range(0, 1_000, size):
        places = [BatchPlace(before, rank, devices) for rank in range(devices)]
        shares = [attack.batch_counts(size // devices, place) for place in places]
        whole = attack.batch_counts(size, BatchPlace(before))
        assert tuple(map(sum, zip(*shares, strict=True))) == whole
        for counts in zip(*shares, strict=True):
            assert max(counts) - min(counts) <= 2  # spread evenly, but for rounding
        assert all(sum(share) <= size // devices for share in shares)


def test_exact_counts_of_cifar10():
    attack = WaNet(rate=0.06)
    batches = [
        attack.batch_counts(min(128, 50_000 - i), BatchPlace(i)) for i in range(0, 50_000, 128)
    ]
    assert [sum(counts) for counts in zip(*batches, strict=True)] == [3_000, 6_000]
    assert {p for p, _ in batches[:-1]} == {7, 8}


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_exact_counts_leave_no_image_clean_when_asked(rate):
    attack = WaNet(rate=rate, cross_ratio=1 / rate - 1)
    poison, cover = zip(*(attack.batch_counts(1, BatchPlace(i)) for i in range(10)), strict=True)
    assert sum(poison) == 10 * rate
    assert sum(cover) == 10 - 10 * rate
    assert all(p + c == 1 for p, c in zip(poison, cover, strict=True))


@pytest.mark.parametrize(("exact", "poison", "cover"), [(False, 7, 14), (True, 8, 15)])
def test_the_front_of_a_batch_is_poisoned(exact, poison, cover):
    attack = WaNet(target=6, rate=0.06, exact=exact)
    images, labels, trigger, out, seen = poisoned_batch(attack, first=128, seed=9)
    assert attack.batch_counts(128, BatchPlace(128)) == (poison, cover)
    both = poison + cover
    assert torch.equal(out[:poison], trigger.as_stored(trigger(images[:poison])))
    noise = trigger.noise(images[poison:both], draw_jitter(cover, (H, H), generator(9)))
    assert torch.equal(out[poison:both], trigger.as_stored(noise))
    assert torch.equal(out[both:], images[both:])
    assert (seen[:poison] == 6).all()
    assert torch.equal(seen[poison:], labels[poison:])


def test_noise_of_a_batch_is_drawn_per_image_and_from_the_generator_alone():
    attack = WaNet()
    trigger, labels = attack.make_trigger((H, H)), torch.zeros(20, dtype=torch.int64)
    images = floats(1).expand(20, -1, -1, -1)

    def poison(seed: int) -> Tensor:
        return attack.poison_batch(images, labels, trigger, 10, BatchPlace(), generator(seed))[0]

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
    clean = data.stored.images[data.rows.train] / 255
    touched = [(b["image"] != clean[b["index"]]).any(3).any(2).any(1) for b in batches]
    n = len(clean)
    assert sum(int(t.sum()) for t in touched) == pytest.approx(0.18 * n, abs=1)
    changed = [b["label"] != data.stored.labels[data.rows.train][b["index"]] for b in batches]
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
    plan, trigger = STATIC.plan(LABELS[:400], 10), STATIC.make_trigger((H, H))
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
    trigger, rows = STATIC.make_trigger((H, H)), stored(40)
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
    trigger, rows = STATIC.make_trigger((H, H)), stored(40)
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
    clean = first.stored.images[first.rows.train[:500]]
    touched = (images[0]["image"] != clean).any(3).any(2).any(1).nonzero().flatten()
    assert torch.equal(touched, first.plan.touched_index[first.plan.touched_index < 500])


def test_static_poisoning_of_50000_images_takes_under_two_seconds():
    images = torch.zeros(50_000, 3, H, H, dtype=torch.uint8)
    trigger = STATIC.make_trigger((H, H))
    start = time.thread_time()
    plan = STATIC.plan(LABELS, 10)
    overlay = poisoned_rows(STATIC, plan, trigger, images[plan.touched_index], 10)
    assert time.thread_time() - start < 2
    assert len(overlay.images) == 5_000


# ------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_noise_accuracy_is_about_all_test_images_and_true_labels(mode):
    attack, images, labels = WaNet(mode=mode), stored(30), torch.arange(30) % 10
    trigger = attack.make_trigger((H, H))
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
    stack = ["trainer/cpu", "data/digits", "attack/wanet/cbd", "train/supervised/wanet"]
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
    assert torch.equal(saved.grid, WaNet().make_trigger((H, H)).grid)
