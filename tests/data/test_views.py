"""What views of a data module hand out: labels of a method's own, and how many batches."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.attacks import BadNets, LabelConsistent, WaNet
from bdclean.data import Digits, ImageFolder, RoleImages, Splits
from bdclean.errors import AttackError, ConfigError
from bdclean.types import Subset, View, ViewableData

SPLITS = Splits(defense=300, probe=100, val=50)


def digits(**arguments):
    return Digits(attack=BadNets(target=6, rate=0.1), splits=SPLITS, **arguments)


def photos(tmp_path):
    for k in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels = np.full((16, 16, 3), 40 * k, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{k}.png")
    folder = str(tmp_path / "photos")
    return ImageFolder(num_classes=10, input_size=16, defense_root=folder, cache=False)


def trained(data, view):
    """Rows and labels of one epoch, as steps receive them."""
    data.set_view(view)
    ready = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    return [torch.cat([batch[key] for batch in ready]) for key in ("index", "label")]


# ---------------------------------------------------------------------- labels of one's own


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("role", ["train", "defense", "probe"])
def test_a_method_may_label_any_role_itself(role, shown):
    """The view may ask for labels or not, and those of the defence are hidden."""
    data = digits()
    rows, own = torch.tensor([7, 3, 20]), torch.tensor([11, 12, 13])
    view = View(role, labels=shown, subset=Subset(rows, own), batch_size=2)
    (batch, last) = data.reading_dataloader(view)
    assert batch["index"].tolist() == [7, 3]
    assert torch.cat([batch["label"], last["label"]]).tolist() == [11, 12, 13]
    index, labels = trained(data, view)
    known = dict(zip(rows.tolist(), own.tolist(), strict=True))
    assert all(known[i] == k for i, k in zip(index.tolist(), labels.tolist(), strict=True))


def test_photos_without_labels_take_those_of_the_method(tmp_path):
    data = photos(tmp_path)
    own = torch.tensor([4, 4, 0, 1, 2, 9])
    view = View("defense", subset=Subset(torch.arange(6), own), batch_size=2)
    index, labels = trained(data, view)
    assert sorted(index.tolist()) == list(range(6))
    assert torch.equal(labels, own[index])
    with pytest.raises(ConfigError, match=r"defense_root=.* have no labels"):
        data.set_view(View("defense", labels=True))


def test_hidden_labels_stay_hidden_beside_own_ones(monkeypatch):
    """Neither the batch nor what makes it holds the data's labels."""
    columns, whole = [], RoleImages.__init__

    def watched(self, images, rows, overlay=None, columns_=None, **words):
        columns.append(columns_ or words.get("columns"))
        whole(self, images, rows, overlay, columns_, **words)

    monkeypatch.setattr(RoleImages, "__init__", watched)
    data = digits()
    subset = Subset(torch.arange(50), torch.zeros(50, dtype=torch.int64))
    _, labels = trained(data, View("defense", labels=True, subset=subset))
    assert labels.unique().tolist() == [0]
    assert columns
    assert not any(columns)
    with pytest.raises(ConfigError, match="defense_labels=hidden"):
        data.set_view(View("defense", labels=True, subset=Subset(torch.arange(50))))


def test_a_subset_without_labels_keeps_those_of_the_data():
    data, rows = digits(), torch.arange(10, 40)
    index, labels = trained(data, View("probe", labels=True, subset=Subset(rows)))
    assert sorted(index.tolist()) == rows.tolist()
    assert torch.equal(labels, data.stored.labels[data.rows.probe][index])
    batch = next(iter(data.reading_dataloader(View("probe", subset=Subset(rows)))))
    assert "label" not in batch


def test_single_samples_of_a_dynamic_attack_are_refused_with_own_labels_too():
    data = Digits(attack=WaNet(target=1, mode="dynamic"), splits=SPLITS)
    subset = Subset(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="no sample is the poisoned one"):
        data.set_view(View("train", subset=subset))


# ---------------------------------------------------------------------- how many


def test_the_protocol_asks_for_the_counts():
    assert isinstance(digits(), ViewableData)
    assert not isinstance(torch.utils.data.TensorDataset(), ViewableData)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop", [True, False])
def test_the_counted_batches_are_those_of_an_epoch_on_each_device(drop, world, monkeypatch):
    data = digits()
    monkeypatch.setattr(Digits, "_world_size", world)
    for number, size in itertools.product((5, 64, 65, 96, 129), (1, 6, 8, 64, 128)):
        view = View("defense", batch_size=size, drop_last=drop, subset=Subset(torch.arange(number)))
        assert data.num_rows(view) == number
        if drop and number < size:
            with pytest.raises(ConfigError, match="fewer than one batch"):
                data.num_batches(view)
            continue
        if size % world:
            with pytest.raises(ConfigError, match=f"multiple of {world}"):
                data.num_batches(view)
            continue
        data.set_view(view)
        shown = [len(batch["index"]) for batch in data.train_dataloader()]
        assert data.num_batches(view) == len(shown)
        assert not drop or set(shown) == {size // world}


def test_counting_leaves_the_present_view():
    data = digits()
    data.set_view(View("probe", batch_size=50))
    assert data.num_batches(View("train", batch_size=100)) == 10
    assert data.num_rows(View("train")) == 950
    assert data.num_rows(View("defense")) == 300
    assert data.view.role == "probe"
    assert len(data.train_dataloader()) == 2


def test_counting_warns_of_nothing(recwarn):
    data = digits()
    data.allow_flip = False
    data.num_batches(View("train", "weak"))
    assert not recwarn.list
    data.set_view(View("train", "weak"))
    with pytest.warns(UserWarning, match="without flips"):
        data.train_dataloader()


def test_counting_refuses_what_serving_would():
    for view, text in (
        (View("defense", labels=True), "defense_labels=hidden"),
        (View("defense", batch_size=301, drop_last=True), "300 images, fewer than one batch"),
    ):
        with pytest.raises(ConfigError, match=text):
            digits().num_batches(view)
    with pytest.raises(ConfigError, match=r"splits\.probe=0"):
        Digits().num_rows(View("probe"))


# ---------------------------------------------------------------------- further tests


def test_names_of_test_sets_are_asked_of_the_class():
    class Never(BadNets):
        further = ("a", "b")

        def further_tests(self, images, labels, trigger):
            raise AssertionError

    assert Digits(attack=Never()).further_tests == ("a", "b")
    assert Digits(attack=LabelConsistent()).further_tests == Digits().further_tests == ()


def test_further_tests_that_the_class_does_not_name_are_refused():
    class Secret(WaNet):
        further = ()

    with pytest.raises(AttackError, match=r"Secret\.further=\(\): .* gives \('noise_acc'"):
        Digits(attack=Secret(target=1)).test_dataloader()
