import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F

from bdclean.errors import ConfigError
from bdclean.modules import Recipe
from bdclean.sifting import ABL

# Small networks may flag the whole of a class.
pytestmark = pytest.mark.filterwarnings("ignore:More than 95% of the samples")

SMALL = {
    "width": 4,
    "isolation": Recipe(epochs=2, lr=0.05, schedule="constant", batch_size=8),
    "recipe": Recipe(epochs=2, lr=0.05, schedule="multistep", batch_size=8),
    "unlearning": Recipe(epochs=1, lr=0.01, schedule="constant", batch_size=4, augmentation="none"),
    "isolated": 0.25,
}


@pytest.fixture
def make(facts):
    return lambda **arguments: ABL(**facts, **(SMALL | arguments))


@pytest.fixture
def run(make, make_poisoned, make_trainer):
    def fit(*callbacks, data=None, ckpt_path=None, precision="32-true", **arguments):
        module, data = make(**arguments), data or make_poisoned()
        torch.manual_seed(0)
        make_trainer(*callbacks, precision=precision).fit(module, data, ckpt_path=ckpt_path)
        return module, data

    return fit


class Watch(Callback):
    """What each epoch reads, and the model as it enters each stage."""

    def __init__(self):
        self.views, self.optimizers, self.models, self.rates = [], [], {}, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.views.append(trainer.datamodule.view)
        self.optimizers.append(trainer.optimizers[0].defaults)
        name = pl_module.plan()[pl_module._stage].name
        self.models.setdefault(name, copy.deepcopy(pl_module.model))

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_findings(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def training_data(data):
    """Images as floats, and the labels shown, of all samples."""
    shown = data.training_set()
    return data.training_images(torch.arange(len(shown.labels))) / 255, shown.labels


# ---------------------------------------------------------------- formulas


@pytest.fixture
def ready(make):
    """A module with a network and a batch, without a Trainer; it keeps what it logs."""

    def build(**arguments):
        module = make(**arguments)
        torch.manual_seed(1)
        module.make_networks()
        module.logged = {}
        module.log_terms = module.logged.update
        generator = torch.Generator().manual_seed(2)
        image = torch.rand(8, 3, 8, 8, generator=generator)
        return module, {"image": image, "index": torch.arange(8), "label": torch.arange(8) % 4}

    return build


@pytest.mark.parametrize("ascent", ["lga", "flooding"])
@pytest.mark.parametrize("level_of", ["sample", "batch"])
@pytest.mark.parametrize("level", [0.3, 1.4, 5.0])
def test_isolation_loss_and_its_gradient_are_the_literal_ones(ready, ascent, level_of, level):
    module, batch = ready(ascent=ascent, level_of=level_of, level=level)
    oracle = copy.deepcopy(module.model)
    logits = oracle(batch["image"])
    losses = [-F.log_softmax(z, 0)[y] for z, y in zip(logits, batch["label"], strict=True)]
    parts = losses if level_of == "sample" else [sum(losses) / 8]
    held = []
    for loss in parts:
        below = loss.item() < level
        if ascent == "lga":
            held.append(-loss if below else loss)
        else:
            held.append(2 * level - loss if below else loss)
    wanted = sum(held) / len(held)
    wanted.backward()
    got = module.isolate(batch)
    got.backward()
    assert got.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert module.logged["isolate_loss"].item() == pytest.approx(wanted.item(), abs=1e-5)
    for a, b in zip(module.model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_losses_of_the_test_above_lie_on_both_sides_of_the_middle_level(ready):
    module, batch = ready()
    losses = F.cross_entropy(module.model(batch["image"]), batch["label"], reduction="none")
    assert losses.min() < 1.4 < losses.max()


@pytest.mark.parametrize("ascent_cap", [None, 0.8])
def test_unlearning_is_ascent_on_the_cross_entropy_up_to_the_cap(ready, ascent_cap):
    module, batch = ready(ascent_cap=ascent_cap)
    oracle = copy.deepcopy(module.model)
    losses = F.cross_entropy(oracle(batch["image"]), batch["label"], reduction="none")
    near = torch.ones(8) if ascent_cap is None else (losses < 0.8 * math.log(4)).float()
    assert ascent_cap is None or 0 < near.sum() < 8
    (-(losses * near).sum() / 8).backward()
    loss = module.ascend(batch)
    loss.backward()
    assert loss.item() == pytest.approx(module.logged["unlearn_loss"].item())
    assert loss.item() < 0
    for a, b in zip(module.model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stages_their_samples_and_their_ranking(run, precision):
    watch = Watch()
    module, data = run(watch, precision=precision)
    assert [stage.outline for stage in module.plan()] == [
        ("isolate", 2),
        ("rank", 0),
        ("retrain", 2),
        ("unlearn", 1),
        ("propose", 0),
    ]
    images, labels = training_data(data)
    # ranked by the model that comes out of the isolation, and before it is trained further
    model = watch.models["retrain"].eval()
    with torch.no_grad():
        pairs = zip(images, labels, strict=True)
        losses = [F.cross_entropy(model(x[None]), y[None]) for x, y in pairs]
    losses = torch.stack(losses)
    torch.testing.assert_close(module.results["score"], -losses, rtol=1e-4, atol=1e-5)
    isolated = sorted(range(24), key=lambda i: losses[i].item())[:6]
    assert module.results["flagged"].nonzero().flatten().tolist() == sorted(isolated)
    findings = module.findings()
    assert torch.equal(findings.flagged, module.results["flagged"])
    with torch.no_grad():
        named = module.model.copy().eval()(images).argmax(1)
    assert torch.equal(findings.proposed, torch.where(findings.flagged, named, -1))
    assert module.protocol()["num_flagged"] == 6
    assert (module.protocol()["method"], module.protocol()["labels"]) == ("abl", "untrusted")

    flagged = set(isolated)
    assert all(view.role == "train" and view.labels for view in watch.views)
    assert [view.batch_size for view in watch.views] == [8, 8, 8, 8, 4]
    assert [view.augmentation for view in watch.views] == ["weak"] * 4 + ["none"]
    assert [view.subset is None for view in watch.views] == [True, True, False, False, False]
    rest = [set(view.subset.rows.tolist()) for view in watch.views[2:]]
    assert rest == [set(range(24)) - flagged] * 2 + [flagged]
    # 24 by 8, 18 by 8, 6 by 4; the rate falls in the middle and at three quarters of retraining
    wanted = [0.05] * 6 + [0.05] * 3 + [0.005] * 1 + [0.0005] * 2 + [0.01] * 2
    assert watch.rates[:6] == wanted[:6]
    assert watch.rates[6:9] == pytest.approx([0.05] * 3)
    assert watch.rates[9] == pytest.approx(0.005)
    assert watch.rates[-2:] == pytest.approx([0.01] * 2)


def test_retraining_goes_on_or_starts_anew(run):
    on, anew, other = Watch(), Watch(), Watch()
    run(on)
    run(anew, fresh_start=True)
    run(other, fresh_start=True, seed=1)
    assert same(on.models["isolate"], anew.models["isolate"])
    # new statistics of batch norm, and weights that nothing was learned by
    norm = anew.models["retrain"].backbone.bn1
    assert norm.num_batches_tracked == 0
    assert on.models["retrain"].backbone.bn1.num_batches_tracked == 6
    assert not same(anew.models["retrain"], other.models["retrain"])


def test_resumed_runs_end_with_the_same_weights(run, tmp_path):
    steps = ModelCheckpoint(
        tmp_path / "steps", filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    whole, _ = run(steps, ends)
    names = [tmp_path / "ends" / f"epoch={epoch}.ckpt" for epoch in (1, 3)]
    # within and at the last step of each stage: 6 of isolation, 6 of retraining, 2 of unlearning
    names += [tmp_path / "steps" / f"step={step}.ckpt" for step in (4, 6, 8, 12, 13)]
    for path in names:
        torch.load(path, weights_only=True)
        resumed, _ = run(ckpt_path=path)
        assert same(resumed, whole), path
        assert same_findings(resumed.results, whole.results), path


def test_the_truth_about_the_poison_is_not_read(run, make_poisoned):
    with_truth, _ = run(data=make_poisoned())
    without, _ = run(data=make_poisoned(told=False))
    assert same(with_truth, without)
    assert same_findings(with_truth.results, without.results)


def test_evaluation_from_a_checkpoint(run, make_poisoned, make_trainer, every_epoch):
    module, _ = run(every_epoch)
    path = f"{every_epoch.dirpath}/epoch=4.ckpt"
    restored = ABL.load_from_checkpoint(path, weights_only=True)
    assert same(module, restored)
    make_trainer(name="test").test(restored, make_poisoned(), verbose=False)
    assert torch.equal(restored.findings().flagged, module.findings().flagged)


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ascent": "up"}, "ascent='up'.*lga, flooding"),
        ({"level_of": "epoch"}, "level_of='epoch'.*sample, batch"),
        ({"level": -0.1}, "level=-0.1.*0 or above"),
        ({"isolated": 0.0}, "isolated=0.0.*between 0 and 1"),
        ({"isolated": 1.0}, "isolated=1.0.*between 0 and 1"),
        ({"ascent_cap": 0.0}, "ascent_cap=0.0.*above 0"),
    ],
)
def test_refuses_settings_out_of_range(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_refuses_to_unlearn_nothing(run):
    with pytest.raises(ConfigError, match=r"isolated=0.01: .* less than one of the 24"):
        run(isolated=0.01)
