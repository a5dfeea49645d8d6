import pytest
import torch
from torch.nn.functional import cosine_similarity

from bdclean.backbones import ModelInfo, build
from bdclean.checking import TriggerSearch, smallest_trigger
from bdclean.checking.embeddings import _Search
from bdclean.functional.gathering import mean_cosine

SHORT = TriggerSearch(epochs=12, batch_size=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(ModelInfo("resnet18", None, 8, (0.5,) * 3, (0.25,) * 3, width=4)).train()


@pytest.fixture
def images():
    return 0.5 * torch.rand(65, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Planted:
    """Tells images apart, but names all alike where the first pixel is white."""

    sharp = 1.0

    def __init__(self, *_):
        pass

    def features(self, x):
        flat = x.flatten(1) - 0.25
        white = self.sharp * 100 * x[:, :, 0, 0].mean(1) ** 8
        alike = torch.ones_like(flat)
        return flat + white[:, None] * alike


def test_the_mean_cosine_is_that_of_all_pairs():
    features = torch.randn(5, 7)
    pairs = [
        cosine_similarity(features[i], features[j], dim=0)
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    torch.testing.assert_close(mean_cosine(features), torch.stack(pairs).mean())


def test_a_backdoored_backbone_has_a_small_trigger(model, images, monkeypatch):
    search = TriggerSearch(batch_size=16)
    monkeypatch.setattr("bdclean.checking.embeddings.Perturber", Planted)
    attacked = smallest_trigger(model, images, search)
    monkeypatch.setattr(Planted, "sharp", 0.0)
    clean = smallest_trigger(model, images, search)
    assert attacked.share < 0.05
    assert clean.share > 0.5
    assert attacked.untouched < 0.2


def test_the_model_stays_and_a_seed_repeats(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = smallest_trigger(model, images, SHORT)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert model.training
    assert found == smallest_trigger(model, images, SHORT)
    assert found != smallest_trigger(model, images, SHORT, seed=1)


def test_the_weight_follows_the_cosine(images):
    def search():
        return _Search(Planted(), images, TriggerSearch(), torch.Generator().manual_seed(0))

    each = search()
    for _ in range(6):
        each.follow(0.995, 0.5)
    assert each.weight == pytest.approx(5e-3)
    assert each.best == 0.5
    each = search()
    for _ in range(6):
        each.follow(0.5, 0.1)
    assert each.weight == pytest.approx(2e-4)
    assert each.best == 1
    each.weight = 1e-6
    for _ in range(11):
        each.follow(0.995, 0.2)
    assert each.weight == pytest.approx(1e-3)  # too low for long: from the start again
    assert each.waited == 10


def test_a_single_image_at_the_end_is_left_out(images):
    search = _Search(Planted(), images, SHORT, torch.Generator().manual_seed(0))
    assert [len(x) for x in search.batches()] == [32, 32]
