"""What purifiers share: parts of the defender's images, and labels that the suspect gives them."""

import pytest
import torch

from bdclean.errors import ConfigError
from bdclean.modules import Needs, Recipe, Stage
from bdclean.purification import Purifier
from bdclean.types import View


class Tuner(Purifier):
    """Trains on a part of the defender's images, with the answers of the suspect."""

    name = "tuner"
    needs = Needs(labels=("pseudo",), head=True)

    def __init__(self, facts, weights=None, share=0.25, with_teacher=True):
        super().__init__(facts, weights)
        self.share, self.with_teacher = share, with_teacher

    @property
    def needs_teacher(self):
        return self.with_teacher

    def plan(self):
        recipe = Recipe(epochs=1, lr=0.01, batch_size=6)
        train = Stage(
            "train",
            recipe,
            begin=self.choose,
            reads=lambda: recipe.view("defense", subset=self.hold_out(self.share)[0]),
            step=self.train_step,
        )
        return (train,)

    def choose(self):
        self.parts = self.hold_out(self.share)
        self.named = self.pseudo_labels(batch_size=7)

    def train_step(self, batch):
        self.seen = [*getattr(self, "seen", ()), batch["index"]]
        return self.model(batch["image"]).square().mean()


@pytest.fixture
def make(facts, suspect):
    return lambda **arguments: Tuner(**facts, weights=suspect, **arguments)


@pytest.fixture
def fitted(make, make_data, make_trainer):
    def fit(**arguments):
        module = make(**arguments)
        make_trainer().fit(module, make_data())
        return module

    return fit


@pytest.mark.parametrize(("share", "held"), [(0.25, 6), (0.1, 2), (0.9, 22), (0.02, 0)])
def test_parts_are_disjoint_and_whole(fitted, share, held):
    if not held:
        with pytest.raises(ConfigError, match=r"held_out=0.02 of 24 images leaves one part empty"):
            fitted(share=share)
        return
    module = fitted(share=share)
    kept, out = (part.rows.tolist() for part in module.parts)
    assert (len(kept), len(out)) == (24 - held, held)
    assert not set(kept) & set(out)
    assert sorted(kept + out) == list(range(24))
    assert kept == sorted(kept)
    assert out == sorted(out)
    assert out != list(range(held))
    assert all(part.labels is None for part in module.parts)
    # what is trained on is the first part
    assert sorted(torch.cat(module.seen).tolist()) == kept


def test_the_choice_is_that_of_the_seed(fitted):
    module = fitted()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (module.hold_out(0.25, seed)[1].rows for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("share", [1.0, 0.99])
def test_nothing_to_train_on_is_refused(fitted, share):
    with pytest.raises(ConfigError, match=f"held_out={share} of 24 images leaves one part empty"):
        fitted(share=share)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_is_above_0_and_at_most_1(fitted, share):
    with pytest.raises(ConfigError, match=f"share={share}: it must be above 0 and at most 1"):
        fitted(share=share)


def test_pseudo_labels_are_the_answers_of_the_suspect(fitted, make_data):
    module, data = fitted(), make_data()
    suspect = module.source.load().eval()
    wanted = torch.empty(24, dtype=torch.long)
    for batch in data.reading_dataloader(View("defense", batch_size=5)):
        with torch.no_grad():
            wanted[batch["index"]] = suspect(batch["image"] / 255).argmax(1)
    named = module.named
    assert torch.equal(named.rows, torch.arange(24))
    assert torch.equal(named.labels, wanted)
    assert named.labels.dtype == torch.long
    assert not named.labels.is_inference()
    assert len(wanted.unique()) > 1
    # of the suspect, and not of what was trained since
    assert torch.equal(module.pseudo_labels(batch_size=24).labels, wanted)


def test_pseudo_labels_need_a_teacher_with_a_head(fitted, suspect):
    with pytest.raises(ConfigError, match="Tuner keeps no copy of the suspect"):
        fitted(with_teacher=False)
    module = fitted()
    module.teacher.replace_head(None)
    with pytest.raises(ConfigError, match="head"):
        module.pseudo_labels()


class SelfTaught(Tuner):
    """Trains on the answers of the suspect."""

    name = "self-taught"

    def plan(self):
        recipe = Recipe(epochs=1, lr=0.01, batch_size=6)
        train = Stage(
            "train",
            recipe,
            reads=lambda: recipe.view("defense", subset=self.pseudo_labels(7)),
            step=self.train_step,
        )
        return (train,)

    def train_step(self, batch):
        self.seen = [*getattr(self, "seen", ()), (batch["index"], batch["label"])]
        return self.cross_entropy(batch)


def test_batches_carry_pseudo_labels_where_the_data_hides_its_own(
    facts, suspect, make_data, make_trainer
):
    module, data = SelfTaught(**facts, weights=suspect), make_data()
    assert data.defense_labels == "hidden"
    make_trainer().fit(module, data)
    index, label = (torch.cat(part) for part in zip(*module.seen, strict=True))
    assert sorted(index.tolist()) == list(range(24))
    assert torch.equal(label, module.pseudo_labels().labels[index])
    assert module.protocol()["labels"] == "pseudo"
