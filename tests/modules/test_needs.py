"""A method reads what it has declared, and nothing else."""

import pytest
import torch
from grouping import make_of

from bdclean.commands.methods import methods
from bdclean.errors import ConfigError
from bdclean.modules import Needs, Recipe, Stage
from bdclean.purification import BCU, CBD, Purifier
from bdclean.types import Subset, View

ROWS = torch.arange(3)
MADE = Subset(ROWS, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("needs", "view"),
    [
        (Needs(), View("defense")),
        (Needs(), View("defense", subset=Subset(ROWS))),
        (Needs(labels=("clean",)), View("defense", labels=True)),
        (Needs(labels=("clean",)), View("probe", labels=True)),
        (Needs(labels=("pseudo",)), View("defense", subset=MADE)),
        (Needs(labels=("pseudo",)), View("defense", labels=True, subset=MADE)),
        (Needs(labels=("pseudo",), images="train"), View("train", subset=MADE)),
        (Needs(labels=("train",), images="train"), View("train", labels=True)),
        (Needs(labels=("untrusted",), images="train"), View("train", labels=True, subset=MADE)),
        (Needs(labels=("untrusted", "clean"), images="train"), View("probe", labels=True)),
        (Needs(images="train"), View("train", views=2)),
        (Needs(labels=("clean",), images="probe"), View("probe", labels=True)),
    ],
)
def test_what_is_declared_may_be_read(needs, view):
    needs.check(view, "Mine")


@pytest.mark.parametrize(
    ("needs", "view", "message"),
    [
        (Needs(), View("defense", labels=True), "labels of the role 'defense'.*labels='none'"),
        (Needs(labels=("pseudo",)), View("defense", labels=True), "labels='pseudo'"),
        (Needs(), View("defense", subset=MADE), "labels of its own.*labels='none'"),
        (Needs(), View("defense", labels=True, subset=MADE), "labels of its own.*labels='none'"),
        (Needs(images="train"), View("train", subset=MADE), "labels of its own.*labels='none'"),
        (Needs(), View("train"), "images of the role 'train'.*images='defense'"),
        (Needs(), View("probe", labels=True), "images of the role 'probe'.*images='defense'"),
        (Needs(images="train"), View("train", labels=True), "labels of the role 'train'"),
        (
            Needs(labels=("clean",), images="train"),
            View("train", labels=True),
            "labels of the role 'train'.*labels='clean'",
        ),
        (
            Needs(labels=("untrusted",), images="train"),
            View("probe", labels=True),
            "images of the role 'probe'.*images='train'",
        ),
        (Needs(labels=("train",), images="train"), View("defense"), "images of the role 'defense'"),
    ],
)
def test_what_is_not_declared_is_refused(needs, view, message):
    with pytest.raises(ConfigError, match=f"Mine .*{message}"):
        needs.check(view, "Mine")


def test_a_probe_at_the_end_reads_the_images_of_the_probe_alone():
    Needs().check(View("probe", labels=True), "Mine", probes=True)
    with pytest.raises(ConfigError, match="labels of the role 'defense'"):
        Needs().check(View("defense", labels=True), "Mine", probes=True)
    with pytest.raises(ConfigError, match="images of the role 'train'"):
        Needs().check(View("train", labels=True), "Mine", probes=True)


@pytest.mark.parametrize(
    ("labels", "told"),
    [((), "none"), (("train",), "train"), (("untrusted", "clean"), "untrusted + clean")],
)
def test_the_name_for_records(labels, told):
    assert Needs(labels=labels).labels_name == told


class Curious(Purifier):
    """Trains with a view that is handed to it, or reads it beforehand."""

    name = "curious"
    needs = Needs()

    def __init__(self, facts, weights, view, before=None):
        super().__init__(facts, weights)
        self.view, self.before = view, before

    def plan(self):
        recipe = Recipe(epochs=1, lr=0.01, batch_size=8)
        begin = None if self.before is None else lambda: list(self.read(self.before))
        return (Stage("learn", recipe, begin=begin, reads=lambda: self.view, step=self.learn),)

    def learn(self, batch):
        return self.model(batch["image"]).square().mean()


@pytest.fixture
def visible(make_data):
    """Data that would show the labels of the defence images to whoever asks."""
    data = make_data()
    data.defense_labels = "visible"
    return data


SECRET, OPEN = View("defense", batch_size=8, labels=True), View("defense", batch_size=8)


def test_a_method_that_asks_for_labels_it_did_not_declare_is_refused(
    facts, suspect, visible, make_trainer
):
    module = Curious(**facts, weights=suspect, view=SECRET)
    with pytest.raises(ConfigError, match="Curious asks for the labels of the role 'defense'"):
        make_trainer().fit(module, visible)
    module = Curious(**facts, weights=suspect, view=OPEN, before=SECRET)
    with pytest.raises(ConfigError, match="Curious asks for the labels of the role 'defense'"):
        make_trainer().fit(module, visible)
    assert not any("label" in keys for _, keys in visible.keys)


def test_a_method_that_declares_them_is_not(facts, suspect, visible, make_trainer):
    class Open(Curious):
        needs = Needs(labels=("clean",))

    module = Open(**facts, weights=suspect, view=SECRET)
    make_trainer().fit(module, visible)
    assert any("label" in keys for _, keys in visible.keys)
    assert module.protocol()["labels"] == "clean"


def test_a_method_without_a_probe_does_not_read_its_images(facts, suspect, make_data, make_trainer):
    module = Curious(**facts, weights=suspect, view=View("probe", batch_size=8, labels=True))
    with pytest.raises(ConfigError, match="images of the role 'probe'"):
        make_trainer().fit(module, make_data())
    module.probes = True
    make_trainer(name="probes").fit(module, make_data())


def test_a_model_without_a_head_is_refused_where_one_is_needed(facts, suspect):
    module = make_of(BCU, facts, {"weights": suspect})
    model = module.source.load()
    model.replace_head(None)
    module.source = type("Source", (), {"load": lambda _: model, "weights": "x.safetensors"})()
    with pytest.raises(ConfigError, match=r"weights=x\.safetensors: .* no classifier head"):
        module.make_networks()
    assert not CBD.needs.head


def test_all_methods_declare_what_they_need():
    found = {method.__name__: method.needs for _, method in methods()}
    labels = {name: needs.labels_name for name, needs in found.items()}
    images = {name: needs.images for name, needs in found.items()}
    wanted = {
        "BCU": ("none", "defense"),
        "CBD": ("none", "defense"),
        "ShortcutDistillation": ("none", "defense"),
        "ABL": ("untrusted", "train"),
        "DBR": ("untrusted", "train"),
        "AdvrBD": ("untrusted", "train"),
        "SCAn": ("untrusted + clean", "train"),
        "KNN": ("clean", "probe"),
        "LinearProbe": ("clean", "probe"),
        "AdversarialTraining": ("train", "train"),
        "InputAwareTraining": ("train", "train"),
        "SimCLR": ("none", "train"),
        "Supervised": ("train", "train"),
    }
    assert {name: (labels[name], images[name]) for name in wanted} == wanted
