"""Roles are disjoint by construction and drawn from their own seed."""

import pytest
import torch
from PIL import Image

from bdclean.data import ImageFolder
from bdclean.data.splits import Splits, draw_roles
from bdclean.errors import ConfigError

LABELS = torch.arange(1000) % 10


def roles(**sizes):
    return draw_roles(LABELS, 10, Splits(**sizes))


def members(rows):
    return set(rows.tolist())


def test_holdout_roles_partition_the_rows():
    drawn = roles(defense=200, probe=50, val=100)
    sets = [members(getattr(drawn, r)) for r in ("train", "defense", "probe", "val")]
    assert [len(s) for s in sets] == [650, 200, 50, 100]
    assert set().union(*sets) == set(range(1000))


def test_defense_from_train_stays_out_of_probe_and_val():
    drawn = roles(defense=200, probe=50, val=100, defense_source="train")
    assert members(drawn.defense) < members(drawn.train)
    assert len(drawn.train) == 850
    assert not members(drawn.train) & (members(drawn.probe) | members(drawn.val))


def test_probe_is_balanced():
    assert torch.bincount(LABELS[roles(probe=50, defense=3).probe]).tolist() == [5] * 10


def test_probe_and_val_do_not_depend_on_the_defense_size():
    small, large = roles(defense=10, probe=50, val=20), roles(defense=400, probe=50, val=20)
    assert torch.equal(small.probe, large.probe)
    assert torch.equal(small.val, large.val)
    assert members(small.defense) < members(large.defense)


def test_the_draw_ignores_the_global_seed_and_follows_its_own():
    torch.manual_seed(1)
    first = roles(defense=200, seed=5)
    torch.manual_seed(2)
    assert roles(defense=200, seed=5).hash == first.hash
    assert roles(defense=200, seed=6).hash != first.hash


def test_the_probe_may_take_all_images():
    drawn = roles(probe=1000)
    assert [len(getattr(drawn, r)) for r in ("train", "defense", "probe", "val")] == [0, 0, 1000, 0]


def test_a_train_role_that_the_probe_left_empty_is_refused(tmp_path):
    for number in range(4):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    data = ImageFolder(str(tmp_path), input_size=8, splits=Splits(probe=4), cache=False)
    assert len(data.role_images("probe", labels=True)) == 4
    with pytest.raises(ConfigError, match="the role train has no images"):
        data.role_images("train", labels=True)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"defense": 1000}, "asks for 1000 images"),
        ({"defense": 10, "probe": 990}, "leaves none to train on"),
        ({"probe": 1010}, "asks for 1010 images"),
        ({"probe": 55}, "multiple of the 10 classes"),
        ({"defense": -1}, "splits.defense=-1: it must be 0 or above"),
    ],
)
def test_wrong_sizes_are_refused(sizes, text):
    with pytest.raises(ConfigError, match=text):
        roles(**sizes)


def test_a_class_too_small_for_the_probe_is_named():
    labels = torch.cat([LABELS, torch.zeros(0, dtype=torch.long)])
    labels[labels == 3] = 4
    with pytest.raises(ConfigError, match="class 3 has only 0"):
        draw_roles(labels, 10, Splits(probe=10))
