import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from bdclean.backbones import build, load_model
from bdclean.errors import ConfigError
from bdclean.functional.feature_consistency import draw_transforms, rotate_and_shift
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Recipe
from bdclean.sifting import DBR

PLAIN = {"schedule": "constant", "augmentation": "none"}
SMALL = {
    "width": 4,
    "warm": Recipe(epochs=1, lr=0.05, batch_size=8, **PLAIN),
    "separate": Recipe(epochs=1, lr=0.04, batch_size=12, **PLAIN),
    "recipe": Recipe(epochs=2, lr=0.03, batch_size=8),
    "removal": Recipe(epochs=2, lr=0.01, batch_size=2, schedule="constant"),
    "clean_part": 0.25,
    "poisoned_part": 0.17,
}
TURNS = ["unlearn", "relearn"] * 2


@pytest.fixture
def make(facts):
    return lambda **arguments: DBR(**facts, **(SMALL | arguments))


@pytest.fixture
def run(make, make_poisoned, make_trainer):
    def fit(*callbacks, data=None, ckpt_path=None, **arguments):
        module, data = make(**arguments), data or make_poisoned()
        torch.manual_seed(0)
        make_trainer(*callbacks).fit(module, data, ckpt_path=ckpt_path)
        return module, data

    return fit


class Watch(Callback):
    """Name, view and optimizer of each epoch, its model at the start, and all batches."""

    def __init__(self):
        self.names, self.views, self.optimizers, self.models = [], [], [], []
        self.batches = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.names.append(pl_module.plan()[pl_module._stage].name)
        self.views.append(trainer.datamodule.view)
        self.optimizers.append(trainer.optimizers[0])
        self.models.append(copy.deepcopy(pl_module.model))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((self.names[-1], {k: v.clone() for k, v in batch.items()}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_findings(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_stages_and_what_they_read(run):
    watch = Watch()
    module, _ = run(watch)
    assert [stage.outline for stage in module.plan()] == [
        ("warm", 1),
        ("separate", 1),
        ("score", 0),
        ("train", 2),
        *((name, 1) for name in TURNS),
        ("propose", 0),
    ]
    assert watch.names == ["warm", "separate", "train", "train", *TURNS]
    assert all(view.role == "train" and view.labels for view in watch.views)
    assert [view.augmentation for view in watch.views] == ["none"] * 2 + ["weak"] * 6
    assert [view.batch_size for view in watch.views] == [8, 12, 8, 8, 2, 2, 2, 2]
    assert all(view.subset is None for view in watch.views[:4])
    flagged, clean = module.results["flagged"], module.results["clean"]
    for view, part in zip(watch.views[4:], [flagged, clean] * 2, strict=True):
        assert torch.equal(view.subset.rows, part.nonzero().flatten())
    rates = [optimizer.defaults["lr"] for optimizer in watch.optimizers]
    assert rates == [0.05, 0.04, 0.03, 0.03, 0.01, 0.01, 0.01, 0.01]
    assert len({id(optimizer) for optimizer in watch.optimizers[4:]}) == 1
    assert module.protocol()["method"] == "dbr"
    assert module.protocol()["labels"] == "untrusted"
    assert module.protocol()["num_flagged"] == 4


def literal_scores(model, images, seed):
    """One image at a time, in evaluation mode."""
    generator = torch.Generator().manual_seed(derive_seed("dbr/transforms", seed))
    degrees, shifts = draw_transforms(len(images), 8, 180.0, 0.2, generator)
    scores = []
    with torch.no_grad():
        for i, x in enumerate(images):
            moved = rotate_and_shift(x[None], degrees[i : i + 1], shifts[i : i + 1])
            difference = model.features(x[None]) - model.features(moved)
            scores.append((difference**2).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("seed", [0, 3])
def test_score_is_the_consistency_of_the_first_network(run, seed, monkeypatch):
    entered = {}
    begin = DBR.score

    def watched(self):
        entered["model"] = copy.deepcopy(self.model).eval()
        begin(self)

    monkeypatch.setattr(DBR, "score", watched)
    scan = DBR.of_each  # in batches of 10, 10 and 4
    smaller = lambda self, f, *, labels: scan(self, f, labels=labels, batch_size=10)  # noqa: E731
    monkeypatch.setattr(DBR, "of_each", smaller)
    module, data = run(seed=seed)
    images = data.training_images(torch.arange(24)) / 255
    wanted = literal_scores(entered["model"], images, seed)
    torch.testing.assert_close(module.results["score"], wanted, rtol=1e-3, atol=1e-6)
    other = literal_scores(entered["model"], images, seed + 1)
    assert not torch.allclose(other, wanted, rtol=1e-2)

    order = sorted(range(24), key=lambda i: wanted[i].item())
    flagged, clean = module.results["flagged"], module.results["clean"]
    assert flagged.nonzero().flatten().tolist() == sorted(order[-4:])  # of 4.08
    assert clean.nonzero().flatten().tolist() == sorted(order[:6])
    assert torch.equal(module.findings().flagged, flagged)
    assert torch.equal(module.findings().score, module.results["score"])


def test_images_that_do_not_change_have_full_consistency(run):
    module, _ = run(degrees=0.0, translate=0.0)
    assert module.results["score"].tolist() == [0] * 24


def test_separation_ends_with_the_weights_of_literal_steps(run, monkeypatch):
    ended = {}
    begin = DBR.score

    def watched(self):
        ended["model"] = copy.deepcopy(self.model)
        begin(self)

    monkeypatch.setattr(DBR, "score", watched)
    watch = Watch()
    run(watch)
    model = copy.deepcopy(watch.models[1])
    optimizer = torch.optim.SGD(model.backbone.parameters(), 0.04, 0.9, weight_decay=5e-4)
    for name, batch in watch.batches:
        if name == "separate":
            features, labels = model.features(batch["image"]), batch["label"]
            means = torch.stack([features[labels == c].mean(0) for c in labels.unique()])
            means = F.normalize(means)
            gram = means @ means.T
            gram = gram.masked_fill(torch.eye(len(gram), dtype=torch.bool), 0.0)
            optimizer.zero_grad()
            gram.mean().backward()
            optimizer.step()
    for name, value in ended["model"].backbone.named_parameters():
        torch.testing.assert_close(value, model.backbone.get_parameter(name), msg=name)
    assert not same(ended["model"], watch.models[1])


def test_the_network_that_is_repaired_knows_nothing_of_the_one_that_scored(run):
    watch = Watch()
    run(watch)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("dbr/train", 0))
        assert same(watch.models[2], build(watch.models[2].info))


def test_removal_is_ascent_and_descent_with_one_momentum(run):
    watch = Watch()
    module, _ = run(watch)
    model = copy.deepcopy(watch.models[4])
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    seen = []
    for name, batch in watch.batches:
        if name not in TURNS:
            continue
        seen.append(name)
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        optimizer.zero_grad()
        (-loss if name == "unlearn" else loss).backward()
        optimizer.step()
    assert seen == (["unlearn"] * 2 + ["relearn"] * 3) * 2  # 4 and 6 samples, two at a time
    for name, value in module.model.named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-3, atol=1e-5, msg=name)


def test_the_network_with_the_backdoor_is_written_beside_the_result(run, tmp_path):
    watch = Watch()
    module, _ = run(watch)
    module.save_artifacts(tmp_path)
    assert same(load_model(tmp_path / "backdoored.safetensors"), watch.models[4])
    assert not same(watch.models[4], module.model)


def test_a_second_fit_starts_from_the_beginning(make, make_poisoned, make_trainer):
    module, results = make(), []
    for name in ("first", "second"):
        torch.manual_seed(0)
        make_trainer(name=name).fit(module, make_poisoned())
        results.append((copy.deepcopy(module.model), module.results))
    assert same(results[0][0], results[1][0])
    assert same_findings(results[0][1], results[1][1])


def test_the_truth_about_the_poison_is_not_read(run, make_poisoned):
    with_truth, _ = run(data=make_poisoned())
    without, _ = run(data=make_poisoned(told=False))
    assert same(with_truth, without)
    assert same_findings(with_truth.results, without.results)


def test_evaluation_from_a_checkpoint(run, make_poisoned, make_trainer, every_epoch):
    module, _ = run(every_epoch)
    restored = DBR.load_from_checkpoint(f"{every_epoch.dirpath}/epoch=7.ckpt", weights_only=True)
    assert same(module, restored)
    make_trainer(name="test").test(restored, make_poisoned(), verbose=False)
    assert torch.equal(restored.findings().flagged, module.findings().flagged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clean_part": 0.0}, "clean_part=0.0, poisoned_part=0.17.*above 0"),
        ({"poisoned_part": 0.8}, "clean_part=0.25, poisoned_part=0.8.*at most 1"),
        ({"degrees": 200.0}, "degrees=200.0.*0 and 180"),
        ({"translate": 1.0}, "translate=1.0.*between 0 and 1"),
        ({"removal": Recipe(schedule="cosine")}, "removal.schedule='cosine'.*constant"),
    ],
)
def test_refuses_settings_out_of_range(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_refuses_to_unlearn_nothing(run):
    with pytest.raises(ConfigError, match=r"poisoned_part=0.01: .* less than one of the 24"):
        run(poisoned_part=0.01)
