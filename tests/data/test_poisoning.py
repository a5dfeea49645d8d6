"""Covers, training versions, further tests and dynamic attacks, with an attack made for it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdclean.attacks import Attack, BadNets, FurtherTest, TaCT
from bdclean.cli import main
from bdclean.data import Digits, Splits
from bdclean.errors import AttackError
from bdclean.types import BatchPlace, View


class Marked(BadNets):
    """BadNets from class 1 alone, with covers of class 2, whose training rows are darker."""

    cover_rate = 0.05
    further = ("leak",)

    def __init__(self, dynamic: bool = False):
        super().__init__(target=6, rate=0.05)
        self._dynamic = dynamic

    @property
    def dynamic(self) -> bool:
        return self._dynamic

    def pool(self, labels: Tensor) -> Tensor:
        return labels == 1

    def cover_pool(self, labels: Tensor) -> Tensor:
        return labels <= 2

    def eligible(self, labels: Tensor) -> Tensor:
        return labels == 1

    def poison_rows(self, images, plan, trigger):
        darker = torch.isin(plan.touched_index, plan.cover_index)
        out = trigger.poison(images)
        out[darker] //= 2
        return out

    def further_tests(self, images, labels, trigger):
        rows = ((labels != 1) & (labels != 6)).nonzero().flatten()
        wanted = torch.full_like(rows, 6)
        return {"leak": FurtherTest(rows, trigger.poison(images[rows]), wanted)}

    def poison_batch(self, images, labels, trigger, num_classes, place, generator):
        out, seen = images.clone(), labels.clone()
        out[0], seen[0] = trigger.as_stored(trigger(images[0])), place.before
        return out, seen


def everything(loader):
    batches = [dict(batch) for batch in loader]
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


@pytest.fixture(scope="module")
def data():
    return Digits(attack=Marked(), splits=Splits(val=50))


def test_covers_come_from_their_pool_keep_labels_and_meet_no_poison(data):
    plan, labels = data.plan, data.stored.labels[data.rows.train]
    n = len(labels)
    assert len(plan.cover_index) == len(plan.poison_index) == round(0.05 * n)
    assert (labels[plan.poison_index] == 1).all()
    assert (labels[plan.cover_index] <= 2).all()
    assert (labels[plan.cover_index] == 1).any()  # its pool is not only what poison leaves over
    assert (plan.labels_seen[plan.poison_index] == 6).all()
    assert torch.equal(plan.labels_seen[plan.cover_index], labels[plan.cover_index])
    parts = torch.cat([plan.poison_index, plan.cover_index, plan.clean_index])
    assert torch.equal(parts.sort().values, torch.arange(n))


def test_too_few_covers_warn():
    class Many(Marked):
        cover_rate = 0.9

    with pytest.warns(UserWarning, match=r"^cover_rate=0\.9: .* 900 rows, but only 250 may"):
        plan = Many().plan(torch.arange(1000) % 10, 10)
    assert len(plan.cover_index) == 250


def test_an_empty_pool_is_refused():
    with pytest.raises(AttackError, match="leaves no row"):
        Marked().plan(torch.zeros(50, dtype=torch.int64), 10)


def test_training_rows_are_the_attacks_own_version(data):
    seen = everything(data.reading_dataloader(View("train", labels=True)))
    clean = data.stored.images[data.rows.train]
    plan = data.plan
    stamped = data.trigger.poison(clean)
    assert torch.equal(seen["image"][plan.poison_index], stamped[plan.poison_index])
    assert torch.equal(seen["image"][plan.cover_index], stamped[plan.cover_index] // 2)
    assert torch.equal(seen["image"][plan.clean_index], clean[plan.clean_index])


def test_further_tests_are_served_after_the_triggered_set(data):
    clean, triggered, leak = data.test_dataloader()
    labels = everything(clean)["label"]
    assert (everything(triggered)["label"] == 1).all()
    rows = everything(leak)
    assert len(rows["label"]) == ((labels != 1) & (labels != 6)).sum()
    assert (rows["target"] == 6).all()
    assert data.further_tests == ("leak",)


@pytest.mark.parametrize("name", ["test_dataloader", "val_dataloader"])
def test_tact_counts_images_of_the_source_class_and_its_leak_those_of_the_others(name):
    data = Digits(attack=TaCT(target=4, source_class=2), splits=Splits(val=50))
    clean, triggered, leak, _ = (everything(loader) for loader in getattr(data, name)())
    labels = clean["label"]
    assert set(labels.tolist()) == set(range(10))
    for loaded, counted in (
        (triggered, labels == 2),
        (leak, (labels != 2) & (labels != 4)),
    ):
        assert torch.equal(loaded["label"], labels[counted])
        assert (loaded["target"] == 4).all()
        assert torch.equal(loaded["image"], data.trigger.poison(clean["image"][counted]))


def test_a_dynamic_attack_changes_batches_before_augmentation_and_no_row():
    data = Digits(attack=Marked(dynamic=True), splits=Splits(val=50))
    assert len(data.plan.touched_index) == 0
    data.set_view(View("train", batch_size=32, labels=True))
    loader = data.train_dataloader()
    white = data.trigger(torch.zeros(3, 32, 32))[:, -3:, -3:]
    for step, batch in enumerate(loader):
        assert batch["place"] == BatchPlace(32 * step)
        before = batch["image"].clone()
        labels = batch["label"].clone()
        ready = data.on_after_batch_transfer(batch, 0)
        assert torch.equal(ready["image"][0, :, -3:, -3:], white)
        assert torch.equal(ready["image"][1:], before[1:].float() / 255)
        assert ready["label"][0] == 32 * step
        assert torch.equal(ready["label"][1:], labels[1:])
        if step == 2:
            break
    scanned = everything(data.reading_dataloader(View("train", labels=True)))
    assert torch.equal(scanned["image"], data.stored.images[data.rows.train])


def test_only_a_fixed_attack_knows_which_samples_are_poisoned():
    for attack in (None, Marked(dynamic=True)):
        known = Digits(attack=attack).training_set()
        assert known.poisoned is known.covers is None
    data = Digits(attack=Marked())
    known = data.training_set()
    assert torch.equal(known.poisoned.nonzero().flatten(), data.plan.poison_index)
    assert torch.equal(known.covers.nonzero().flatten(), data.plan.cover_index)
    assert torch.equal(known.labels, data.plan.labels_seen)


def test_as_stored_is_what_poison_stores():
    attack = BadNets()
    trigger = attack.make_trigger((8, 8))
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = trigger.as_stored(images) * 255
    assert torch.equal(levels.round(), (images.double() * 255).round().float())
    assert (levels - levels.round()).abs().max() < 1e-4
    assert trigger.as_stored(images) is not images


def test_other_roles_of_a_dynamic_attack_stay_clean():
    data = Digits(attack=Marked(dynamic=True), splits=Splits(defense=100))
    data.set_view(View("defense", batch_size=32))
    batch = next(iter(data.train_dataloader()))
    before = batch["image"].clone()
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], before.float() / 255)


@pytest.mark.filterwarnings("ignore")
def test_the_record_of_a_run_has_the_further_test(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    stack = ["trainer/cpu", "data/digits", "train/supervised/fast"]
    words = [word for name in stack for word in ("-c", f"{root}/configs/{name}.yaml")]
    attack = ["--data.attack", f"{__name__}.Marked", "--run", "run"]
    main(["fit", *words, *attack, "--model.width", "4", "--trainer.max_epochs", "1"])
    record = json.loads(Path("run/result.json").read_text())
    assert 0 <= record["metrics"]["leak"] <= 100
    assert record["metrics"]["n_leak"] > record["metrics"]["n_triggered"]
    assert record["data"]["num_covers"] == record["data"]["num_poisoned"] > 0


def test_attacks_without_further_tests_have_none():
    data = Digits(attack=BadNets(), splits=Splits(val=50))
    assert data.further_tests == ()
    assert isinstance(data.attack, Attack)
    assert len(data.test_dataloader()) == 2
