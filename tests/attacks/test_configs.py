"""The attack files: complete, on their own keys only, and valid."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import bdclean.attacks
from bdclean.attacks import Attack
from bdclean.types import BatchPlace

FOLDER = Path(__file__).parents[2] / "configs" / "attack"
LABELS = torch.arange(50_000) % 10


def attack_of(path: Path) -> dict:
    tree = yaml.safe_load(path.read_text())
    assert tree.keys() == {"data"}
    assert tree["data"].keys() == {"init_args"}
    assert tree["data"]["init_args"].keys() == {"attack"}
    return tree["data"]["init_args"]["attack"]


def arguments(cls: type) -> set[str]:
    """What the command line knows of an attack, with what is forwarded to the base."""
    parser = ArgumentParser()
    parser.add_class_arguments(cls)
    return set(vars(parser.get_defaults()))


FILES = [p for p in sorted(FOLDER.rglob("*.yaml")) if "none" not in p.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_file_sets_every_argument_with_its_source(path):
    entry = attack_of(path)
    assert entry.keys() == {"class_path", "init_args"}
    module, _, name = entry["class_path"].rpartition(".")
    assert module == "bdclean.attacks"
    cls = getattr(bdclean.attacks, name)
    assert issubclass(cls, Attack)
    assert entry["init_args"].keys() == arguments(cls)
    cls(**entry["init_args"])
    lines = path.read_text().splitlines()
    for key in entry["init_args"]:
        line = next(line for line in lines if line.strip().startswith(f"{key}:"))
        assert "  # " in line, f"{key} has no source"


def test_none_is_no_attack():
    assert attack_of(FOLDER / "none.yaml") is None


def build(name: str) -> Attack:
    entry = attack_of(FOLDER / f"{name}.yaml")
    return getattr(bdclean.attacks, entry["class_path"].rpartition(".")[2])(**entry["init_args"])


@pytest.mark.parametrize(
    ("name", "n", "count", "target", "changes_labels"),
    [
        ("badnets/cbd", 50_000, 3_000, 6, True),
        ("blend/cbd", 50_000, 3_000, 6, True),
        ("sig/cbd", 50_000, 3_000, 6, True),
        ("badnets/cbd_ssl", 50_000, 3_000, 6, False),
        ("blend/cbd_ssl", 50_000, 3_000, 6, False),
        ("sig/cbd_ssl", 50_000, 3_000, 6, False),
        ("badnets/bcu", 45_000, 4_500, 0, True),
        ("blend/bcu", 45_000, 4_500, 0, True),
        ("sig/bcu", 45_000, 3_600, 0, False),
        ("badnets/advrbd", 50_000, 2_500, 1, True),
        ("blend/advrbd", 50_000, 2_500, 1, True),
        ("sig/advrbd", 50_000, 2_500, 1, False),
        ("label_consistent/cbd", 50_000, 3_000, 6, False),
        ("label_consistent/bcu", 45_000, 3_600, 0, False),
        ("wanet/advrbd", 50_000, 2_500, 1, True),
        ("physical/advrbd", 50_000, 2_500, 1, True),
        ("physical/backdoorbox", 50_000, 2_500, 1, True),
        ("tact/advrbd", 50_000, 2_500, 1, True),
        ("tact/toolbox", 50_000, 150, 0, True),
        ("adaptive_blend/advrbd", 50_000, 2_500, 1, True),
        ("adaptive_blend/toolbox", 50_000, 150, 0, True),
        ("adaptive_patch/advrbd", 50_000, 2_500, 1, True),
        ("adaptive_patch/toolbox", 50_000, 150, 0, True),
    ],
)
def test_presets_give_the_published_counts_on_cifar10(name, n, count, target, changes_labels):
    plan = build(name).plan(LABELS[:n], 10)
    assert len(plan.poison_index) == count
    assert (plan.labels_seen[plan.poison_index] == target).all()
    assert (plan.num_label_changed > 0) == changes_labels


def test_static_wanet_has_as_many_covers_as_poisons():
    assert len(build("wanet/advrbd").plan(LABELS, 10).cover_index) == 2_500


@pytest.mark.parametrize(
    ("name", "n", "target", "poison", "cover"),
    [("wanet/cbd", 50_000, 6, 3_000, 6_000), ("wanet/bcu", 45_000, 0, 4_219, 8_438)],
)
def test_dynamic_presets_poison_the_published_share_of_an_epoch(name, n, target, poison, cover):
    attack = build(name)
    assert (attack.dynamic, attack.target) == (True, target)
    counts = [
        attack.batch_counts(min(128, n - first), BatchPlace(first)) for first in range(0, n, 128)
    ]
    assert [sum(c) for c in zip(*counts, strict=True)] == [poison, cover]


@pytest.mark.parametrize(
    ("name", "covers"),
    [
        ("physical/advrbd", 0),
        ("tact/advrbd", 500),
        ("tact/toolbox", 150),
        ("adaptive_blend/advrbd", 500),
        ("adaptive_blend/toolbox", 150),
        ("adaptive_patch/advrbd", 500),
        ("adaptive_patch/toolbox", 300),
    ],
)
def test_presets_give_the_published_covers_on_cifar10(name, covers):
    plan = build(name).plan(LABELS, 10)
    assert len(plan.cover_index) == covers
    assert torch.equal(plan.labels_seen[plan.cover_index], LABELS[plan.cover_index])


@pytest.mark.parametrize("name", ["badnets/cbd_ssl", "blend/cbd_ssl", "sig/cbd_ssl"])
def test_ssl_presets_touch_3000_images_of_class_6_and_no_label(name):
    plan = build(name).plan(LABELS, 10)
    assert len(plan.touched_index) == 3_000
    assert (LABELS[plan.touched_index] == 6).all()
    assert torch.equal(plan.labels_seen, LABELS)


def test_the_imagenet_presets():
    labels = torch.arange(100).repeat_interleave(1_300)
    plan = build("badnets/cbd_imagenet100_ssl").plan(labels, 100)
    assert len(plan.poison_index) == 780
    assert (labels[plan.poison_index] == 6).all()
    assert torch.equal(plan.labels_seen, labels)
    assert len(build("badnets/cbd_imagenet100").plan(labels, 100).poison_index) == 7_800
    mask = build("badnets/cbd_imagenet100").make_trigger((224, 224)).mask[0]
    assert mask[:32, :32].all()
    assert mask.sum() == 32 * 32


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("badnets/cbd", 0, 0),
        ("badnets/cbd_ssl", 14, 14),
        ("badnets/bcu", 29, 29),
        ("label_consistent/cbd", 0, 0),
    ],
)
def test_patch_presets_lie_where_the_paper_says(name, row, column):
    mask = build(name).make_trigger((32, 32)).mask[0]
    rows, columns = mask.nonzero(as_tuple=True)
    assert (rows.min(), rows.max()) == (row, row + 2)
    assert (columns.min(), columns.max()) == (column, column + 2)
    assert mask.sum() == 9
