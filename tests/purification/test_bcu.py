import copy
import math
from pathlib import Path

import pytest
import torch
from grouping import make_of
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.errors import ConfigError
from bdclean.functional.seeds import derive_seed
from bdclean.purification import BCU
from bdclean.types import ImageFacts, View

PUBLISHED = [0.01, 0.01, 0.01, 0.03, 0.03, 0.09, 0.09, 0.27, 0.27, 0.10]
SMALL = {"recipe": {"epochs": 2, "batch_size": 10}}


@pytest.fixture
def make(suspect, facts):
    return lambda **arguments: make_of(BCU, facts, {"weights": suspect}, SMALL, arguments)


@pytest.fixture
def students(make, suspect):
    """The suspect and its student, without a Trainer."""

    def build_both(**arguments):
        return load_model(suspect), make(**arguments).make_student(load_model(suspect))

    return build_both


def split_state(model):
    """State of convolutions and linear layers, and all the rest."""
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    state = model.state_dict()
    weights = {k: v for k, v in state.items() if k.rpartition(".")[0] in layers}
    return weights, {k: v for k, v in state.items() if k not in weights}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- re-initialisation


@pytest.mark.parametrize("arguments", [{"ratios": [0.0] * 10}, {"strategy": "none"}])
def test_ratio_0_keeps_the_suspect(students, arguments):
    suspect, student = students(**arguments)
    assert equal(suspect.state_dict(), student.state_dict())


def test_ratio_1_draws_every_weight_anew_and_no_batch_norm(students):
    suspect, student = students(ratios=[1.0] * 10)
    (old, norms), (new, kept) = split_state(suspect), split_state(student)
    assert len(new) == 22
    assert equal(norms, kept)
    assert not any((old[key] == new[key]).any() for key in old)
    # The fresh weights are those of a new network, each layer with its own scale.
    fresh, _ = split_state(build(suspect.info))
    for key in new:
        if new[key].numel() > 500:
            assert new[key].std().item() == pytest.approx(fresh[key].std().item(), rel=0.15), key


def test_published_ratios_at_every_depth():
    # Wide enough to count; the numbers of the paper are those of width 64.
    info = ModelInfo("resnet18", 10, 32, (0.5,) * 3, (0.2,) * 3, width=64)
    torch.manual_seed(0)
    suspect = build(info)
    module = BCU(ImageFacts(10, 32, info.mean, info.std))
    ratios, fraction = module.block_ratios(suspect)
    assert ratios == pytest.approx(PUBLISHED)
    assert fraction == pytest.approx(2_471_401 / 11_164_362, abs=1e-6)

    student = module.make_student(suspect.copy())
    (old, norms), (new, kept) = split_state(suspect), split_state(student)
    assert equal(norms, kept)
    changed = {key: int((old[key] != new[key]).sum()) for key in old}
    assert abs(sum(changed.values()) - 2_471_401) <= 6_800
    blocks = {
        f"backbone.layer{i}.{j}": PUBLISHED[2 * i - 1 + j] for i in (1, 2, 3, 4) for j in (0, 1)
    }
    by_prefix = {"backbone.conv1": 0.01, **blocks, "head": 0.10}
    for key, count in changed.items():
        (ratio,) = [r for prefix, r in by_prefix.items() if key.startswith(prefix)]
        n = old[key].numel()
        assert abs(count - n * ratio) <= 5 * math.sqrt(n * ratio * (1 - ratio)), key
    # Which elements are drawn anew says nothing about the values that they get.
    key = "backbone.layer4.1.conv2.weight"
    drawn = new[key][new[key] != old[key]]
    assert drawn.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)


def test_masks_and_fresh_weights_are_drawn_from_two_streams(students, monkeypatch):
    drawn = []

    def watched(*words):
        drawn.append(derive_seed(*words))
        return drawn[-1]

    monkeypatch.setattr("bdclean.purification.bcu.derive_seed", watched)
    students(reinit_seed=3)
    assert len(drawn) == len(set(drawn)) == 2


def test_reinitialisation_has_a_seed_of_its_own(students):
    torch.manual_seed(1)
    _, first = students()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    _, second = students()
    assert torch.equal(before, torch.get_rng_state())
    _, other = students(reinit_seed=1)
    assert equal(first.state_dict(), second.state_dict())
    assert not equal(first.state_dict(), other.state_dict())


def test_strategies_and_strength(make, suspect):
    model = load_model(suspect)
    increasing, fraction = make().block_ratios(model)
    assert increasing == pytest.approx(PUBLISHED)
    assert make(strategy="uniform").block_ratios(model) == (
        pytest.approx([fraction] * 10),
        pytest.approx(fraction),
    )
    falling, same = make(strategy="decreasing", gamma=2.0).block_ratios(model)
    assert same == pytest.approx(fraction)
    assert falling[1:9] == sorted(falling[1:9], reverse=True)
    single, _ = make(strategy="single_stage", single_group=2).block_ratios(model)
    assert [ratio > 0 for ratio in single] == [False] * 5 + [True] * 2 + [False] * 3
    doubled, _ = make(strength=2.0).block_ratios(model)
    assert doubled == pytest.approx([2 * ratio for ratio in PUBLISHED])
    capped, _ = make(strength=100.0).block_ratios(model)
    assert max(capped) == min(capped) == 1
    given, _ = make(ratios=[0.1] * 10, strength=2.0).block_ratios(model)
    assert given == pytest.approx([0.2] * 10)


def test_refuses_ratios_that_do_not_fit(make, suspect):
    with pytest.raises(ConfigError, match=r"ratios=\[0.1, 0.2\]: 10 numbers .* head"):
        make(ratios=[0.1, 0.2]).block_ratios(load_model(suspect))
    with pytest.raises(ConfigError, match="from 0 to 1"):
        make(ratios=[-0.1] * 10).block_ratios(load_model(suspect))


def test_refuses_a_suspect_without_head(make, suspect):
    model = load_model(suspect)
    model.replace_head(None)
    save_model(model, suspect)
    with pytest.raises(ConfigError, match=r"has no classifier head.*CBD"):
        make().make_networks()


# ---------------------------------------------------------------- distillation


@pytest.fixture
def ready(make, monkeypatch):
    def build_networks(epoch, **arguments):
        module = make(**arguments)
        suspect = module.source.load()
        module.install(model=module.make_student(suspect.copy()), teacher=suspect)
        module.add_networks()
        monkeypatch.setattr(BCU, "current_epoch", epoch)
        module.log_terms = lambda **_: None
        return module

    return build_networks


def test_temperature_rises_to_its_final_value(ready):
    assert ready(0, recipe={"epochs": 100}).temperature == pytest.approx(1.03)
    assert ready(49, recipe={"epochs": 100}).temperature == pytest.approx(2.5)
    assert ready(99, recipe={"epochs": 100}).temperature == pytest.approx(4.0)
    assert ready(0, recipe={"epochs": 100}, temperature_schedule="constant").temperature == 4.0


@pytest.mark.parametrize(
    ("labels", "epoch", "temperature"), [("soft", 0, 2.5), ("soft", 1, 4.0), ("hard", 1, None)]
)
def test_loss_is_the_divergence_from_the_teacher(ready, labels, epoch, temperature):
    module = ready(epoch, labels=labels)
    with torch.no_grad():  # logits far enough apart that direction and temperature matter
        module.teacher.head.weight.mul_(8)
        module.model.head.weight.mul_(5)
    images = torch.rand(6, 3, 8, 8)
    student, teacher = module.model.copy(), module.teacher.copy().eval()
    z_t, z_s = teacher(images).detach(), student(images)
    if labels == "soft":
        p, q = F.softmax(z_t / temperature, 1), F.softmax(z_s / temperature, 1)
        expected = (p * (p.log() - q.log())).sum(1).mean()
    else:
        expected = -F.log_softmax(z_s, 1)[torch.arange(6), z_t.argmax(1)].mean()
    expected.backward()
    loss = module.distil({"image": images, "index": torch.arange(6)})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() > 0.01
    for got, want in zip(module.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in module.teacher.parameters())
    # The student's running statistics move, the teacher's stay.
    assert torch.equal(module.model.backbone.bn1.running_mean, student.backbone.bn1.running_mean)
    assert equal(module.teacher.state_dict(), teacher.state_dict())


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def runs(make, make_data, make_trainer):
    def run(*callbacks, data=None, ckpt_path=None, **arguments):
        module, data = make(**arguments), data or make_data()
        make_trainer(*callbacks, reload_dataloaders_every_n_epochs=0).fit(
            module, data, ckpt_path=ckpt_path
        )
        return module, data

    return run


def test_teacher_stays_and_no_label_is_seen(runs, suspect):
    module, data = runs()
    assert set(data.asked) == {View("defense", "weak", batch_size=10)}
    assert not any("label" in keys for _, keys in data.keys)
    original = load_model(suspect)
    assert equal(original.state_dict(), module.teacher.state_dict())
    assert not any(layer.training for layer in module.teacher.modules())
    start = make_start(module)
    assert not equal(start.state_dict(), module.model.state_dict())
    pointers = [
        {value.data_ptr() for value in net.state_dict().values()}
        for net in (module.model, module.teacher)
    ]
    assert not pointers[0] & pointers[1]


def make_start(module):
    return module.make_student(module.source.load())


def test_labels_do_not_change_the_weights(runs, make_data, make_trainer, make):
    plain, _ = runs()

    class WithLabels(type(make_data())):
        """Hands out random labels with the defence images, though nobody asked."""

        def on_after_batch_transfer(self, batch, dataloader_idx):
            ready = super().on_after_batch_transfer(batch, dataloader_idx)
            labels = torch.Generator().manual_seed(len(self.keys))
            ready["label"] = torch.randint(4, (len(ready["image"]),), generator=labels)
            return ready

    other, _ = runs(data=WithLabels())
    assert equal(plain.state_dict(), other.state_dict())


def test_learning_rate_falls_as_a_cosine_per_epoch(runs):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module, _ = runs(Rates(), recipe={"epochs": 4})
    wanted = [0.005 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates == pytest.approx([rate for rate in wanted for _ in range(3)])
    assert module.trainer.current_epoch == 4


def test_resume_from_any_epoch_ends_with_the_same_weights(runs, every_epoch):
    whole, _ = runs(every_epoch, recipe={"epochs": 3})
    for epoch in range(2):
        path = f"{every_epoch.dirpath}/epoch={epoch}.ckpt"
        torch.load(path, weights_only=True)
        resumed, _ = runs(ckpt_path=path, recipe={"epochs": 3})
        assert equal(whole.state_dict(), resumed.state_dict()), epoch


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_is_stopped_has_not_finished_and_goes_on_where_it_was(
    step, runs, make, make_data, cut
):
    whole, _ = runs()
    stopped = make()
    path = cut(stopped, make_data(), step)
    protocol = stopped.protocol()
    assert not protocol["finished"]
    assert protocol["reinit_ratios"] == pytest.approx(PUBLISHED)  # it is no suspect any more
    resumed, _ = runs(ckpt_path=path)
    assert resumed.trainer.global_step == 6
    assert equal(whole.state_dict(), resumed.state_dict())
    assert resumed.protocol()["finished"]


def test_a_run_that_goes_on_behind_its_last_batch_has_finished(runs, tmp_path):
    steps = ModelCheckpoint(tmp_path / "s", "{step}", save_top_k=-1, every_n_train_steps=3)
    whole, _ = runs(steps)
    resumed, _ = runs(ckpt_path=tmp_path / "s" / "step=6.ckpt")
    assert equal(whole.state_dict(), resumed.state_dict())
    assert resumed.protocol()["finished"]


def test_evaluation_from_a_checkpoint_needs_no_suspect(
    runs, make, make_data, make_trainer, every_epoch, suspect, tmp_path
):
    module, _ = runs(every_epoch)
    Path(suspect).unlink()
    path = f"{every_epoch.dirpath}/epoch=1.ckpt"
    evaluated = make()
    make_trainer(name="test").test(evaluated, make_data(), ckpt_path=path, verbose=False)
    assert equal(module.state_dict(), evaluated.state_dict())
    protocol = evaluated.protocol()
    assert protocol == module.protocol()
    assert protocol["reinit_ratios"] == pytest.approx(PUBLISHED)
    assert {key: protocol[key] for key in ("method", "head", "labels", "finished")} == {
        "method": "bcu",
        "head": "original",
        "labels": "none",
        "finished": True,
    }
    save_model(module.product(), tmp_path / "clean.safetensors")
    clean = load_model(tmp_path / "clean.safetensors")
    assert equal(copy.deepcopy(clean.state_dict()), module.model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "random"}, "strategy='random'.*increasing"),
        ({"labels": "true"}, "labels='true'.*soft, hard"),
        ({"final_temperature": 0.0}, r"final_temperature=0.0.*above 0"),
        ({"temperature_schedule": "falling"}, "temperature_schedule='falling'.*rising"),
        ({"recipe": {"schedule": "step"}}, "schedule='step'.*cosine"),
        ({"recipe": {"epochs": 0}}, "epochs=0"),
        ({"recipe": {"batch_size": 0}}, "batch_size=0"),
        ({"recipe": {"lr": -0.02}}, "lr=-0.02: it must be at least 0"),
        ({"recipe": {"momentum": -0.1}}, "momentum=-0.1: it must be at least 0"),
        ({"recipe": {"weight_decay": -0.1}}, "weight_decay=-0.1: it must be at least 0"),
    ],
)
def test_refuses_settings_out_of_range(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_a_trainer_that_has_fitted_is_refused(make, make_data, make_trainer):
    trainer = make_trainer()
    trainer.fit(make(), make_data())
    with pytest.raises(ConfigError, match="has trained 2 epochs already"):
        trainer.fit(make(), make_data())
