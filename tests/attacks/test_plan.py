"""Selection, label rules and the record of both."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdclean.attacks import SIG, BadNets, Blend, PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.errors import AttackError, BdcleanError
from bdclean.files import safetensors_metadata

C = 10


def balanced(n: int, num_classes: int = C) -> Tensor:
    labels = torch.arange(n) % num_classes
    return labels[torch.randperm(n, generator=torch.Generator().manual_seed(7))]


CIFAR = balanced(50_000)
SMALL = balanced(2_000)
DIRTY = BadNets(target=6, rate=0.06)
CLEAN = SIG(target=6, rate=0.6, rate_base="target_class", label_rule="clean_label")
CYCLE = Blend(rate=0.1, label_rule="all_to_all")


@pytest.mark.parametrize(
    ("rate", "n", "count"),
    [
        (0.06, 50_000, 3_000),  # CBD
        (0.05, 50_000, 2_500),  # AdvrBD
        (0.05, 9_469, 473),  # AdvrBD, Imagenette
        (0.01, 9_469, 95),  # rounded, not floored
        (0.1, 45_000, 4_500),  # BCU
        (0.05, 100_000, 5_000),  # Tiny-ImageNet
        (1.0, 40, 40),
    ],
)
def test_counts_relative_to_the_data_set(rate, n, count):
    plan = BadNets(rate=rate).plan(balanced(n), C)
    assert len(plan.poison_index) == count
    assert plan.rate_of_dataset == count / n


@pytest.mark.parametrize(
    ("rate", "class_size", "count"), [(0.6, 5_000, 3_000), (0.6, 1_300, 780), (0.8, 4_500, 3_600)]
)
def test_counts_relative_to_the_target_class(rate, class_size, count):
    labels = balanced(class_size * C)
    plan = SIG(target=6, rate=rate, rate_base="target_class").plan(labels, C)
    assert len(plan.poison_index) == count
    assert plan.rate_of_target_class == count / class_size
    assert (labels[plan.poison_index] == 6).all()


def test_poison_cover_and_clean_rows_partition_the_set(any_attack):
    plan = any_attack.plan(SMALL, C)
    rows = torch.cat([plan.poison_index, plan.cover_index, plan.clean_index])
    assert torch.equal(rows.sort().values, torch.arange(len(SMALL)))
    for index in (plan.poison_index, plan.cover_index, plan.clean_index):
        assert index.dtype == torch.int64
        assert torch.equal(index, index.sort().values)
    assert len(plan.poison_index) == 0 if any_attack.dynamic else len(plan.poison_index) > 0
    covers = 0 if any_attack.dynamic else round(any_attack.cover_rate * len(SMALL))
    assert len(plan.cover_index) == covers
    kept = torch.cat([plan.cover_index, plan.clean_index])
    assert torch.equal(plan.labels_seen[kept], SMALL[kept])
    poisoned = SMALL[plan.poison_index]
    if any_attack.label_rule != "clean_label":
        poisoned = any_attack.wanted_label(poisoned, C)
    assert torch.equal(plan.labels_seen[plan.poison_index], poisoned)
    assert torch.equal(plan.labels_true, SMALL)


def test_dirty_labels():
    plan = DIRTY.plan(CIFAR, C)
    assert (plan.labels_seen[plan.poison_index] == 6).all()
    among_target = int((CIFAR[plan.poison_index] == 6).sum())
    assert 200 < among_target < 400  # every class is in the pool, about a tenth is the target's
    assert plan.num_label_changed == 3_000 - among_target
    assert plan.rate_of_target_class == 3_000 / 5_000
    per_class = CIFAR[plan.poison_index].bincount(minlength=C)
    assert (per_class > 200).all()


def test_excluding_the_target_class_keeps_the_count():
    plan = BadNets(target=6, rate=0.06, exclude_target=True).plan(CIFAR, C)
    assert (CIFAR[plan.poison_index] != 6).all()
    assert plan.num_label_changed == len(plan.poison_index) == 3_000
    assert int((plan.labels_seen == 6).sum()) == 8_000


def test_clean_label_changes_no_label():
    plan = CLEAN.plan(CIFAR, C)
    assert torch.equal(plan.labels_seen, CIFAR)
    assert plan.num_label_changed == 0
    assert (CIFAR[plan.poison_index] == 6).all()


def test_clean_label_with_a_rate_of_the_whole_set():
    attack = SIG(target=1, rate=0.05, rate_base="dataset", label_rule="clean_label")
    plan = attack.plan(CIFAR, C)
    assert len(plan.poison_index) == 2_500
    assert (CIFAR[plan.poison_index] == 1).all()


def test_all_to_all_moves_each_label_to_the_next():
    plan = CYCLE.plan(CIFAR, C)
    poisoned = plan.poison_index
    assert torch.equal(plan.labels_seen[poisoned], (CIFAR[poisoned] + 1) % C)
    assert plan.num_label_changed == 5_000
    assert plan.target is None
    assert plan.rate_of_target_class is None


def test_too_large_a_count_takes_the_whole_pool_and_warns():
    labels = balanced(50_000, 100)
    attack = SIG(target=1, rate=0.05, rate_base="dataset", label_rule="clean_label")
    with pytest.warns(UserWarning, match=r"^rate=0\.05: .* 2,500 rows, but only 500 "):
        plan = attack.plan(labels, 100)
    assert torch.equal(plan.poison_index, (labels == 1).nonzero().flatten())
    assert plan.rate == 0.05


def test_wanted_label_and_eligible_rows():
    labels = torch.tensor([0, 6, 9, 6])
    for attack in (DIRTY, CLEAN):
        assert attack.wanted_label(labels, C).tolist() == [6, 6, 6, 6]
        assert attack.eligible(labels).tolist() == [True, False, True, False]
    assert CYCLE.wanted_label(labels, C).tolist() == [1, 7, 0, 7]
    assert CYCLE.eligible(labels).tolist() == [True, True, True, True]


def test_eligible_test_set_and_the_rates_it_gives():
    labels = balanced(10_000)
    rows = DIRTY.eligible(labels)
    truth = labels[rows]
    wanted = DIRTY.wanted_label(truth, C)
    assert len(truth) == 9_000
    assert not (truth == 6).any()

    def rates(predicted: Tensor) -> tuple[float, float]:
        return (
            (predicted == wanted).double().mean().item(),
            (predicted == truth).double().mean().item(),
        )

    assert rates(torch.full_like(truth, 6)) == (1, 0)
    assert rates(truth) == (0, 1)
    random = torch.randint(0, C, truth.shape, generator=torch.Generator().manual_seed(0))
    assert 0 < sum(rates(random)) <= 1


def test_plan_depends_on_its_own_seed_alone(any_attack):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = any_attack.plan(SMALL, C)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        torch.rand(100)
        second = any_attack.plan(SMALL, C)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)  # the global one is not even read
    assert first.hash == second.hash
    assert torch.equal(first.poison_index, second.poison_index)
    assert torch.equal(first.cover_index, second.cover_index)
    reseeded = copy.copy(any_attack)
    reseeded.seed = 1
    other = reseeded.plan(SMALL, C)
    assert other.hash != first.hash
    if not any_attack.dynamic:  # whose plan touches no row
        assert not torch.equal(first.poison_index, other.poison_index)


def test_golden_plan():
    # pins the selection, so that plans of other releases can be told to be the same
    plan = BadNets(target=1, rate=0.25, seed=3).plan(torch.arange(20) % 4, 4)
    assert plan.poison_index.tolist() == [6, 8, 11, 13, 14]


def test_labels_of_the_caller_are_not_shared():
    labels = balanced(100)
    plan = BadNets().plan(labels, C)
    before = plan.hash
    labels.fill_(0)
    assert plan.hash == before


def test_small_integer_labels_are_taken():
    labels = balanced(100)
    assert BadNets().plan(labels.to(torch.uint8), C).hash == BadNets().plan(labels, C).hash


def test_saved_plan_is_the_same(any_attack, tmp_path):
    plan = any_attack.plan(SMALL, C)
    plan.save(tmp_path / "run")
    loaded = PoisonPlan.load(tmp_path / "run")
    assert loaded.hash == plan.hash
    for name in ("poison_index", "cover_index", "labels_seen", "labels_true"):
        assert torch.equal(getattr(loaded, name), getattr(plan, name))
    for name in ("rate", "rate_base", "num_samples", "attack", "target", "label_rule", "seed"):
        assert getattr(loaded, name) == getattr(plan, name)


def test_saved_files_are_plain_and_hold_no_path(tmp_path):
    plan = DIRTY.plan(balanced(1000), C)
    plan.save(tmp_path)
    DIRTY.make_trigger((32, 32)).save(tmp_path / "trigger.safetensors")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["plan.json", "plan.safetensors", "trigger.safetensors"]
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert str(Path.home()).encode() + b"/" not in content
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["num_poison"] == 60
    assert facts["attack"] == "BadNets"
    assert facts["hash"] == plan.hash
    assert facts["num_label_changed"] == plan.num_label_changed


def test_loading_refuses_a_plan_that_was_changed(tmp_path):
    with pytest.raises(BdcleanError, match=r"plan\.safetensors"):
        PoisonPlan.load(tmp_path)
    DIRTY.plan(balanced(1000), C).save(tmp_path)
    path = tmp_path / "plan.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "seed": 9}))
    with pytest.raises(AttackError, match="do not match"):
        PoisonPlan.load(tmp_path)
    del facts["seed"]
    path.write_text(json.dumps(facts))
    with pytest.raises(AttackError, match=r"plan\.json: .*seed"):
        PoisonPlan.load(tmp_path)


DEEP = "[" * 100_000
SPOILT = {
    "deep JSON": lambda facts: DEEP,
    "a list": lambda facts: "[1]",
    "no JSON": lambda facts: "{",
    "nothing": lambda facts: "",
    "bytes": lambda facts: "\udcff",
    "a number of 5,000 digits": lambda facts: json.dumps(facts).replace("1000", "9" * 5000),
    "another number of rows": lambda facts: json.dumps(facts | {"num_samples": 10**30}),
    "a text for a number": lambda facts: json.dumps(facts | {"num_samples": "many"}),
    "a mapping for a number": lambda facts: json.dumps(facts | {"num_samples": {}}),
    "no settings": lambda facts: "{}",
}


@pytest.mark.parametrize("case", SPOILT)
def test_odd_settings_of_a_plan_are_one_sentence(case, tmp_path):
    DIRTY.plan(balanced(1000), C).save(tmp_path)
    path = tmp_path / "plan.json"
    text = SPOILT[case](json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AttackError) as raised:
        PoisonPlan.load(tmp_path)
    said = str(raised.value)
    assert said.startswith(f"{path}: not a saved poison plan: ")
    assert len(said) < 500
    assert said.endswith(".")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: {"x": torch.zeros(1)},
        lambda tensors: {k: v for k, v in tensors.items() if k != "cover_index"},
        lambda tensors: tensors | {"labels_seen": tensors["labels_seen"].float()},
        lambda tensors: tensors | {"poison_index": tensors["poison_index"][None].repeat(2, 1)},
        lambda tensors: tensors | {"poison_index": -tensors["poison_index"] - 1},
        lambda tensors: tensors | {"poison_index": torch.tensor(3)},
    ],
)
def test_odd_tensors_of_a_plan_are_one_sentence(spoil, tmp_path):
    DIRTY.plan(balanced(1000), C).save(tmp_path)
    file = tmp_path / "plan.safetensors"
    save_file(spoil(load_file(file)), file)
    with pytest.raises(AttackError, match=r"plan\.json: not a saved poison plan: .+\.$"):
        PoisonPlan.load(tmp_path)


ODD_TRIGGERS = {
    "deep": {"arguments": DEEP},
    "a list": {"arguments": "[1]"},
    "a number": {"arguments": "3"},
    "nothing": {"arguments": ""},
    "another argument": {"arguments": '{"strength": 3}'},
    "a text for a tensor": {"arguments": '{"pattern": "x", "mask": {}}'},
    "digits": {"arguments": f'{{"size": {"9" * 5000}}}'},
}


@pytest.mark.parametrize("case", ODD_TRIGGERS)
@pytest.mark.parametrize("tensors", [True, False])
def test_odd_contents_of_a_trigger_are_one_sentence(case, tensors, tmp_path):
    path = tmp_path / "trigger.safetensors"
    DIRTY.make_trigger((32, 32)).save(path)
    metadata = safetensors_metadata(path) | ODD_TRIGGERS[case]
    save_file(load_file(path) if tensors else {"x": torch.zeros(1)}, path, metadata)
    with pytest.raises(AttackError) as raised:
        Trigger.load(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: not a saved bdclean.attacks.")
    assert len(said) < 500


def test_hash_covers_every_field():
    plan = DIRTY.plan(balanced(1000), C)
    changes = {
        "poison_index": plan.poison_index[1:],
        "cover_index": plan.clean_index[:1],
        "labels_seen": (plan.labels_seen + 1) % C,
        "labels_true": (plan.labels_true + 1) % C,
        "rate": 0.07,
        "rate_base": "target_class",
        "attack": "Blend",
        "target": 5,
        "label_rule": "clean_label",
        "seed": 1,
    }
    hashes = {replace(plan, **{name: value}).hash for name, value in changes.items()}
    assert len(hashes | {plan.hash}) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"poison_index": torch.tensor([3, 1])}, "sorted"),
        ({"poison_index": torch.tensor([1, 1])}, "distinct"),
        ({"cover_index": torch.tensor([1])}, "distinct"),
        ({"poison_index": torch.tensor([1, 10])}, r"\[0, 10\)"),
        ({"poison_index": torch.tensor([-1, 1])}, r"\[0, 10\)"),
        ({"poison_index": torch.tensor([1], dtype=torch.int32)}, "int64"),
        ({"labels_seen": torch.zeros(9, dtype=torch.int64)}, "10 labels"),
    ],
)
def test_a_plan_that_is_no_partition_is_refused(change, message):
    plan = BadNets(rate=0.2).plan(torch.arange(10), 10)
    plan = replace(plan, poison_index=torch.tensor([1, 3]))
    with pytest.raises(AttackError, match=message):
        replace(plan, **change)


def test_a_write_that_fails_leaves_the_plan_as_it_was(tmp_path, monkeypatch):
    plan = DIRTY.plan(SMALL, C)
    plan.save(tmp_path)
    before = (tmp_path / "plan.json").read_bytes()
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(BdcleanError, match=r"cannot be written: No space left on device\."):
        plan.save(tmp_path)
    monkeypatch.setattr("bdclean.attacks.plan.weights_format.write", lambda *_: "")
    with pytest.raises(BdcleanError, match=r"plan\.json cannot be written"):
        plan.save(tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
