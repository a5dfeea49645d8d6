"""The training images by role, without a Trainer, a data module or a data set on disk."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bdclean.attacks import BadNets, PoisonPlan, Trigger, WaNet
from bdclean.data.images import ImageSet
from bdclean.data.poisoned_set import PoisonedSet
from bdclean.data.poisoning import evaluation_sets
from bdclean.data.splits import Splits
from bdclean.errors import AttackError, ConfigError

N, K, SIZE = 200, 4, 8
SPLITS = Splits(defense=60, probe=20, val=20)


def stored(files=(), classes=()):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    return ImageSet(images, torch.arange(N) % K, files, classes)


def made(attack=BadNets(target=1, rate=0.25), splits=SPLITS, **facts):  # noqa: B008
    trigger = None if attack is None else attack.make_trigger((SIZE, SIZE))
    return PoisonedSet.draw(stored(**facts), K, splits, attack, trigger)


@pytest.fixture(scope="module")
def poisoned():
    return made()


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("make_trigger", "Trigger"),
        ("plan", "PoisonPlan"),
        ("pool", "Tensor"),
        ("poison_rows", "Tensor"),
    ],
)
def test_what_a_users_own_attack_forgets_to_return_is_told(method, kind):
    own = type("Own", (BadNets,), {method: lambda *_: None})
    message = rf"^Own: {method}\(\) must return a {kind}, and it returned None\.$"
    with pytest.raises(AttackError, match=message):
        _ = made(own(target=1, rate=0.25)).overlay


@pytest.mark.parametrize("method", ["eligible", "wanted_label", "further_tests"])
def test_and_so_it_is_of_the_test_images(method):
    own = type("Own", (BadNets,), {method: lambda *_: None})(target=1)
    test = stored()
    with pytest.raises(AttackError, match=rf"^Own: {method}\(\) must return a "):
        evaluation_sets(own, own.make_trigger((SIZE, SIZE)), test.images, test.labels, K)


def test_it_cannot_be_changed(poisoned):
    with pytest.raises(dataclasses.FrozenInstanceError):
        poisoned.plan = None


def test_the_train_role_is_poisoned_where_planned_and_nowhere_else(poisoned):
    plan, role = poisoned.plan, poisoned.role("train", labels=True)
    clean = poisoned.stored.images[poisoned.rows.train]
    batch = role.everything()
    assert len(plan.poison_index) == 25
    expected = clean.clone()
    expected[plan.poison_index] = poisoned.trigger.poison(clean[plan.poison_index])
    assert torch.equal(batch["image"], expected)
    assert torch.equal(batch["label"], plan.labels_seen)
    assert (batch["label"][plan.poison_index] == 1).all()
    assert torch.equal(batch["index"], torch.arange(len(clean)))


@pytest.mark.parametrize("role", ["defense", "probe", "val"])
def test_all_other_roles_are_clean_with_their_true_labels(poisoned, role):
    batch = poisoned.role(role, labels=True).everything()
    rows = getattr(poisoned.rows, role)
    assert torch.equal(batch["image"], poisoned.stored.images[rows])
    assert torch.equal(batch["label"], poisoned.stored.labels[rows])
    assert set(poisoned.role(role).everything()) == {"image", "index"}


def test_rows_are_shown_poisoned_and_known_clean(poisoned):
    rows = torch.cat([poisoned.plan.poison_index[:3], poisoned.plan.clean_index[:2]])
    role = poisoned.role("train")
    assert torch.equal(role.clean(rows), poisoned.stored.images[poisoned.rows.train[rows]])
    assert torch.equal(role.shown(rows), role.__getitems__(rows)["image"])
    changed = (role.clean(rows) != role.shown(rows)).flatten(1).any(1)
    assert changed.tolist() == [True] * 3 + [False] * 2


def test_nothing_is_ever_written_to_the_stored_images(poisoned):
    before = poisoned.stored.images.clone()
    role = poisoned.role("train")
    role.shown([0, 1]).zero_()
    role.clean([0, 1]).zero_()
    role.everything()["image"].zero_()
    assert torch.equal(poisoned.stored.images, before)


def test_the_overlay_is_made_when_the_train_role_is_read_and_once():
    class Counted(BadNets):
        calls = 0

        def poison_rows(self, images, plan, trigger):
            self.calls += 1
            return super().poison_rows(images, plan, trigger)

    attack = Counted(target=1, rate=0.25)
    poisoned = made(attack)
    for role in ("defense", "probe", "val"):
        poisoned.role(role)
    poisoned.truth()
    poisoned.describe()
    assert attack.calls == 0
    assert poisoned.role("train").overlay is poisoned.role("train").overlay
    assert attack.calls == 1


def test_the_truth_is_that_of_the_plan():
    names = tuple(f"{k}.png" for k in range(N))
    poisoned = made(files=names, classes=("a", "b", "c", "d"))
    known = poisoned.truth()
    assert torch.equal(known.poisoned.nonzero().flatten(), poisoned.plan.poison_index)
    assert not known.covers.any()
    assert torch.equal(known.labels, poisoned.plan.labels_seen)
    assert known.files == tuple(names[row] for row in poisoned.rows.train.tolist())
    assert known.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize("attack", [None, WaNet(target=1, mode="dynamic")])
def test_nobody_knows_who_is_poisoned_without_a_fixed_attack(attack):
    poisoned = made(attack)
    known = poisoned.truth()
    assert known.poisoned is known.covers is None
    assert torch.equal(known.labels, poisoned.stored.labels[poisoned.rows.train])
    assert known.files == ()


def test_the_description_is_json_and_names_sizes_and_hashes(poisoned):
    facts = json.loads(json.dumps(poisoned.describe()))
    assert facts["sizes"] == {"train": 100, "defense": 60, "probe": 20, "val": 20}
    assert facts["split_hash"] == poisoned.rows.hash
    assert facts["plan_hash"] == poisoned.plan.hash
    assert (facts["num_poisoned"], facts["num_covers"]) == (25, 0)
    assert facts["attack"]["attack"] == "BadNets"
    clean = made(None).describe()
    assert clean == {key: facts[key] for key in ("sizes", "split_hash")} | {"attack": None}


def test_plan_and_trigger_are_saved_together(poisoned, tmp_path):
    poisoned.save(tmp_path)
    assert PoisonPlan.load(tmp_path).hash == poisoned.plan.hash
    trigger = Trigger.load(tmp_path / "trigger.safetensors")
    assert trigger.fingerprint == poisoned.trigger.fingerprint
    (tmp_path / "clean").mkdir()
    made(None).save(tmp_path / "clean")
    assert list(Path(tmp_path / "clean").iterdir()) == []


def test_an_empty_role_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"^splits\.probe=0: the role probe has no images"):
        made(splits=Splits()).role("probe")
    whole = made(splits=Splits(probe=N))
    assert whole.plan is None
    assert "plan_hash" not in whole.describe()
    with pytest.raises(ConfigError, match=r"^splits: .*the role train has no images"):
        whole.role("train")


def test_batches_are_changed_by_dynamic_attacks_alone(poisoned):
    assert poisoned.batch_poisoner(flip=True) is None
    assert made(None).batch_poisoner(flip=True) is None
    assert made(WaNet(target=1, mode="dynamic")).batch_poisoner(flip=True) is not None


def test_an_attack_that_does_not_fit_is_refused_when_drawn():
    with pytest.raises(AttackError, match="target"):
        made(BadNets(target=9))
    with pytest.raises(ConfigError, match="has no labels"):
        PoisonedSet.draw(dataclasses.replace(stored(), labels=None), K, SPLITS)
