import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from grouping import make_of
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from bdclean.backbones import load_model, save_model
from bdclean.errors import ConfigError
from bdclean.functional.pgd import pgd
from bdclean.purification import CBD
from bdclean.types import View

LAMBDAS = ("lambda_pull", "lambda_kd", "lambda_sft")
SMALL = {"recipe": {"epochs": 1, "batch_size": 8}, "pgd": {"steps": 2}, "probe": None}


def weights_of(*lambdas):
    return dict(zip(LAMBDAS, lambdas, strict=True))


@pytest.fixture
def make(suspect, facts):
    return lambda **arguments: make_of(CBD, facts, {"weights": suspect}, SMALL, arguments)


@pytest.fixture
def ready(make):
    """A module whose networks are built, without a Trainer; it keeps what it logs."""

    def build(**arguments):
        module = make(**arguments)
        suspect = module.source.load()
        teacher = suspect.copy() if module.needs_teacher else None
        module.install(model=module.make_student(suspect), teacher=teacher)
        module.add_networks()
        module.logged = {}
        module.log_terms = module.logged.update
        return module

    return build


def batch_of(count, size=6):
    generator = torch.Generator().manual_seed(11)
    views = tuple(torch.rand(size, 3, 8, 8, generator=generator) for _ in range(count))
    return {"image": views[0], "index": torch.arange(size), "views": views}


def contrastive(a, b, temperature=0.5):
    """Eq. (7), literally: every row of either set is an anchor once."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    n, total = len(a), 0.0
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        others = [z[i] @ z[k] / temperature for k in range(2 * n) if k != i]
        total += -(z[i] @ z[partner]) / temperature + torch.stack(others).exp().sum().log()
    return total / (2 * n)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    "lambdas", [(0.3, 0.5, 0.2), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5)]
)
def test_loss_and_gradient_are_those_of_equations_2_to_5(ready, monkeypatch, lambdas):
    module = ready(**weights_of(*lambdas))
    # A student that has moved, so that its features are not those of the teacher.
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.2)
    monkeypatch.setattr(module, "perturbed", lambda images, reference: (images + 0.1).clamp(0, 1))
    batch = batch_of(len(module.view_names))
    view = dict(zip(module.view_names, batch["views"], strict=True))

    oracle, teacher = module.model.copy(), module.source.load().eval()
    terms = {}
    if lambdas[2]:
        z_i, z_j = oracle.features(torch.cat([view["i"], view["j"]])).chunk(2)
        terms["sft"] = contrastive(z_i, z_j)
    else:
        z_i = oracle.features(view["i"])
    if lambdas[0]:
        adversarial = (view["k"] + 0.1).clamp(0, 1)
        terms["pull"] = contrastive(z_i.detach(), oracle.features(adversarial))
    if lambdas[1]:
        terms["kd"] = contrastive(z_i, teacher.features(view["i"]).detach())
    weight = dict(zip(("pull", "kd", "sft"), lambdas, strict=True))
    expected = sum(weight[name] * term for name, term in terms.items())
    expected.backward()

    loss = module.purify(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert module.logged.keys() == {"loss", *terms}
    for name, term in terms.items():
        assert module.logged[name].item() == pytest.approx(term.item(), abs=1e-5)
    pairs = zip(module.model.named_parameters(), oracle.parameters(), strict=True)
    for (name, got), want in pairs:
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(p.grad is None for p in module.teacher.parameters()) if lambdas[1] else True


def test_gradient_of_pull_flows_through_the_adversarial_features_only(ready):
    module = ready()
    z_i = torch.randn(5, 7, requires_grad=True)
    z_a = torch.randn(5, 7, requires_grad=True)
    module.contrast(z_i.detach(), z_a).backward()
    assert z_i.grad is None
    assert z_a.grad.abs().sum() > 0


def test_distillation_of_an_unmoved_student_is_the_value_of_equal_features(ready):
    module = ready(**weights_of(0, 1, 0))
    module.model.eval()
    batch = batch_of(1)
    features = module.teacher.features(batch["views"][0])
    loss = module.purify(batch)
    assert loss.item() == pytest.approx(contrastive(features, features).item(), abs=1e-5)


def test_only_needed_views_are_asked_for(make):
    names = {
        (0.3, 0.5, 0.2, "j"): "ijk",
        (0.3, 0.5, 0.2, "i"): "ijk",
        (0.5, 0.5, 0, "j"): "ijk",
        (0.5, 0.5, 0, "i"): "ik",
        (0, 0.5, 0.5, "j"): "ij",
        (0, 1, 0, "j"): "i",
    }
    for (*lambdas, reference), wanted in names.items():
        module = make(**weights_of(*lambdas), adv_reference=reference)
        assert module.view_names == wanted
        assert module.needed_views() == View("defense", "simclr", len(wanted), 8, drop_last=True)


@pytest.mark.parametrize("reference", ["j", "i"])
def test_perturbation_departs_from_view_k_and_its_reference(ready, monkeypatch, reference):
    module = ready(adv_reference=reference)
    batch, calls = batch_of(3), []

    def perturb(images, other):
        calls.append((images, other))
        return images

    monkeypatch.setattr(module, "perturbed", perturb)
    module.purify(batch)
    ((images, other),) = calls
    assert images is batch["views"][2]
    assert other is batch["views"]["ij".index(reference)]


def test_no_perturbation_without_pull_and_no_teacher_without_distillation(ready, monkeypatch):
    module = ready(**weights_of(0, 0, 1))

    def perturb(*_):
        pytest.fail("perturbed")

    monkeypatch.setattr(module, "perturbed", perturb)
    module.purify(batch_of(2))
    assert module._modules["teacher"] is None


# ---------------------------------------------------------------- the perturbation


def test_the_suspect_may_be_perturbed_instead_of_the_student(ready):
    module = ready(**weights_of(1, 0, 0), perturb="suspect", pgd={"random_start": False})
    images, reference = batch_of(2)["views"]
    before = module.perturbed(images, reference)
    assert (before - images).abs().max() > 0
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert torch.equal(module.perturbed(images, reference), before)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_perturbation_is_pgd_on_the_contrastive_loss(ready, mode):
    module = ready(perturb_bn=mode, pgd={"random_start": False, "steps": 4})
    images, reference = batch_of(2)["views"]
    before = copy.deepcopy(module.model.state_dict())
    adversarial = module.perturbed(images, reference)

    net = module.model.copy().train(mode == "train")
    fixed = net.features(reference).detach()
    expected, epsilon = images.clone(), 8 / 255
    for _ in range(4):
        expected.requires_grad_()
        loss = contrastive(net.features(expected), fixed)
        (gradient,) = torch.autograd.grad(loss, expected)
        expected = expected.detach() + 0.1 * epsilon * gradient.sign()
        delta = (expected - images).clamp(-epsilon, epsilon)
        expected = (images + delta).clamp(0, 1)
    # Folding changes rounding, and with it the sign of gradients next to zero.
    same = (adversarial - expected).abs() < 1e-6
    assert same.float().mean() > 0.97
    assert not adversarial.requires_grad
    after = module.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in module.model.parameters())
    assert module.model.training

    other = module.model.copy().train(mode != "train")
    raised = contrastive(net.features(adversarial), fixed) - contrastive(
        net.features(images), fixed
    )
    assert raised > 0
    elsewhere = other.features(reference).detach()
    assert not torch.allclose(elsewhere, fixed, atol=1e-3)  # the modes differ


def test_perturbation_follows_the_student(ready):
    module = ready(pgd={"random_start": False, "steps": 1})
    images, reference = batch_of(2)["views"]
    module.perturbed(images, reference)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.model.features(images)  # statistics move as well
    again = module.perturbed(images, reference)
    fresh = ready(pgd={"random_start": False, "steps": 1})
    fresh.model.load_state_dict(module.model.state_dict())
    torch.testing.assert_close(again, fresh.perturbed(images, reference), rtol=0, atol=0)
    expected = module.model.copy().eval().features(images)
    # Folding rounds relative to the largest features, not to each one.
    error = (module._perturber.features(images) - expected).norm() / expected.norm()
    assert error < 1e-4


def test_random_start_uses_the_global_generator(ready):
    module = ready(pgd={"steps": 1})
    images, reference = batch_of(2)["views"]
    torch.manual_seed(1)
    first = module.perturbed(images, reference)
    other = module.perturbed(images, reference)
    torch.manual_seed(1)
    assert torch.equal(first, module.perturbed(images, reference))
    assert not torch.equal(first, other)
    assert (first - images).abs().max() <= 8 / 255 + 1e-7


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_perturbation_under_autocast_runs_in_bfloat16(ready, monkeypatch, mode):
    module = ready(perturb_bn=mode)
    images, reference = batch_of(2)["views"]
    dtypes = []

    def spy(images, loss, config):
        hook = nn.modules.module.register_module_forward_hook(
            lambda layer, _, output: (
                dtypes.append(output.dtype) if isinstance(layer, nn.Conv2d) else None
            )
        )
        try:
            return pgd(images, loss, config)
        finally:
            hook.remove()

    monkeypatch.setattr("bdclean.purification.cbd.pgd", spy)
    with torch.autocast("cpu", torch.bfloat16):
        adversarial = module.perturbed(images, reference)
    assert adversarial.dtype == torch.float32
    assert set(dtypes) == {torch.bfloat16}


# ---------------------------------------------------------------- batch norm


@pytest.mark.parametrize("updates", [True, False])
def test_adversarial_batch_updates_statistics_on_request(ready, monkeypatch, updates):
    module = ready(adv_updates_bn=updates)
    monkeypatch.setattr(module, "perturbed", lambda images, reference: images)
    oracle = module.model.copy()
    v_i, v_j, v_k = batch_of(3)["views"]
    module.purify(batch_of(3))
    oracle.features(torch.cat([v_i, v_j]))
    if updates:
        oracle.features(v_k)
    got, want = module.model.backbone.bn1, oracle.backbone.bn1
    torch.testing.assert_close(got.running_mean, want.running_mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(got.running_var, want.running_var, rtol=0, atol=1e-7)
    assert got.momentum == want.momentum


def test_reestimated_statistics_are_the_mean_over_clean_batches(make, make_data, make_trainer):
    module, data = make(reestimate_bn=True), make_data()
    make_trainer().fit(module, data)
    means, model = [], module.model
    for batch in data.reading_dataloader(View("defense", batch_size=8)):
        x = model.backbone.conv1(model.normalize(batch["image"] / 255))
        means.append(x.mean(dim=(0, 2, 3)))
    assert len(means) == 3
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(model.backbone.bn1.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert model.backbone.bn1.momentum == 0.1


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def runs(make, make_data, make_trainer):
    def run(*callbacks, data=None, ckpt_path=None, precision="32-true", **arguments):
        module, data = make(**arguments), data or make_data()
        trainer = make_trainer(*callbacks, precision=precision)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, data

    return run


def backbone(module):
    return {k: v for k, v in module.model.state_dict().items() if not k.startswith("head")}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_plan(make):
    def outline(**arguments):
        return [stage.outline for stage in make(**arguments).plan()]

    assert outline() == [("purify", 1)]
    assert outline(probe={"solver": "sgd"}) == [("purify", 1), ("probe", 40)]
    assert outline(probe={"solver": "lbfgs"}, reestimate_bn=True, recipe={"epochs": 15}) == [
        ("purify", 15),
        ("reestimate", 0),
        ("probe", 0),
    ]


def test_probe_leaves_the_backbone_alone_and_labels_never_reach_it(runs, make_data):
    plain, data = runs()
    assert {role for role, _ in data.keys} == {"defense"}
    assert not any("label" in keys for _, keys in data.keys)
    assert plain.model.head is None

    probed, data = runs(probe={"solver": "sgd", "recipe": {"epochs": 2, "batch_size": 8}})
    assert not any("label" in keys for role, keys in data.keys if role == "defense")
    assert any("label" in keys for role, keys in data.keys if role == "probe")
    assert equal(backbone(plain), backbone(probed))

    # Labels change the head and nothing else.
    other, _ = runs(
        data=make_data(shuffle_labels=True),
        probe={"solver": "sgd", "recipe": {"epochs": 2, "batch_size": 8}},
    )
    assert equal(backbone(probed), backbone(other))
    weight = probed.model.head.linear.weight
    assert not torch.equal(weight, other.model.head.linear.weight)

    solved, _ = runs(probe={"solver": "lbfgs"})
    assert equal(backbone(plain), backbone(solved))
    assert not torch.equal(weight, solved.model.head.linear.weight)


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_probe_standardises_with_its_own_images(runs, probe):
    module, data = runs(probe={"solver": probe, "recipe": {"epochs": 1}})
    module.model.eval()
    features = [
        module.model.features(data.device_batch(batch, torch.device("cpu"))["image"])
        for batch in data.reading_dataloader(module.probe.view)
    ]
    features = F.normalize(torch.cat(features).detach(), dim=1)
    assert len(features) == 16
    head = module.model.head
    torch.testing.assert_close(head.mean, features.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.std, (features.var(0) + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
    assert head.linear.weight.requires_grad == (probe == "sgd")


def test_teacher_stays_and_student_moves(runs, suspect):
    module, _ = runs()
    original = load_model(suspect).state_dict()
    assert equal(original, module.teacher.state_dict())
    assert not any(layer.training for layer in module.teacher.modules())
    moved = backbone(module)
    assert not torch.equal(original["backbone.conv1.weight"], moved["backbone.conv1.weight"])
    storages = [
        {v.data_ptr() for v in net.state_dict().values()}
        for net in module.children()
        if hasattr(net, "features")
    ]
    assert len(storages) == 2
    assert not storages[0] & storages[1]


def test_resume_from_any_epoch_ends_with_the_same_weights(runs, every_epoch):
    settings = {
        "recipe": {"epochs": 2, "schedule": "cosine"},
        "probe": {"solver": "sgd", "recipe": {"epochs": 2, "batch_size": 8}},
    }
    whole, _ = runs(every_epoch, **settings)
    for epoch in range(3):
        path = f"{every_epoch.dirpath}/epoch={epoch}.ckpt"
        torch.load(path, weights_only=True)
        resumed, _ = runs(ckpt_path=path, **settings)
        assert equal(whole.state_dict(), resumed.state_dict()), epoch


def test_evaluation_from_a_checkpoint_needs_no_suspect(
    runs, make, make_data, make_trainer, every_epoch, suspect, tmp_path
):
    module, _ = runs(every_epoch, probe={"solver": "lbfgs"})
    path = f"{every_epoch.dirpath}/epoch=0.ckpt"
    Path(suspect).unlink()
    evaluated = make(probe={"solver": "lbfgs"})
    (scores,) = make_trainer(name="test").test(
        evaluated, make_data(), ckpt_path=path, verbose=False
    )
    assert equal(module.state_dict(), evaluated.state_dict())
    assert 0 <= scores["test/acc"] <= 100
    assert evaluated.protocol() == module.protocol()
    assert module.protocol() == {
        "method": "cbd",
        "head": "probe",
        "labels": "none",
        "probe": "lbfgs",
        "probe_labels": "clean",
        "finished": True,
    }
    restored = CBD.load_from_checkpoint(path, weights_only=True)
    assert equal(module.state_dict(), restored.state_dict())

    exported = str(tmp_path / "clean.safetensors")
    save_model(module.product(), exported)
    images = torch.rand(5, 3, 8, 8)
    clean = load_model(exported).eval()
    torch.testing.assert_close(clean(images), module.model.eval()(images))
    assert clean.info.head == "probe"


def test_evaluation_without_a_checkpoint_is_of_the_suspect(make, make_data, make_trainer):
    module = make()
    make_trainer().test(module, make_data(), verbose=False)
    assert module.protocol()["finished"] is False
    assert module.protocol()["head"] == "original"


def test_validation_waits_for_the_probe(make, make_data, make_trainer):
    class Seen(Callback):
        def __init__(self):
            self.epochs = []

        def on_validation_end(self, trainer, pl_module):
            if "val/acc" in trainer.callback_metrics:
                self.epochs.append(trainer.current_epoch)

    def data():
        made = make_data()
        made.splits = dataclasses.replace(made.splits, defense=16, val=8)
        made.validate_in_fit = True
        return made

    seen = Seen()
    make_trainer(seen, limit_val_batches=None).fit(
        make(probe={"solver": "sgd", "recipe": {"epochs": 2}}), data()
    )
    module = make()
    assert seen.epochs == [module.recipe.epochs, module.recipe.epochs + 1]
    with pytest.raises(ConfigError, match=r"validate_in_fit: .*without a probe"):
        make_trainer().fit(make(probe=None), data())


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_head_that_was_never_trained_is_not_tested(
    probe, step, make, make_data, make_trainer, cut
):
    module = make(probe={"solver": probe, "recipe": {"epochs": 2}}, recipe={"epochs": 2})
    path = cut(module, make_data(), step)
    protocol = module.protocol()
    assert (protocol["head"], protocol["finished"]) == ("untrained", False)
    assert "probe" not in protocol
    restored = make(probe={"solver": probe, "recipe": {"epochs": 2}}, recipe={"epochs": 2})
    with pytest.raises(ConfigError, match=r"before its linear probe.*--ckpt_path"):
        make_trainer(name="test").test(restored, make_data(), ckpt_path=path, verbose=False)
    assert restored.protocol() == protocol
    make_trainer(name="resumed").fit(restored, make_data(), ckpt_path=path)
    assert restored.untested is None
    assert restored.protocol()["head"] == "probe"


def test_the_probe_may_be_augmented_otherwise(make):
    def augmentation(**probe):
        return make(probe=probe).plan()[-1].reads().augmentation

    assert augmentation(solver="sgd") == "weak"
    assert augmentation(recipe={"augmentation": "imagenet"}) == "imagenet"


def test_refuses_evaluation_without_model(facts, make_data, make_trainer):
    with pytest.raises(ConfigError, match=r"model.weights"):
        make_trainer().test(CBD(**facts), make_data(), verbose=False)
    with pytest.raises(ConfigError, match=r"model.weights"):
        make_trainer().predict(CBD(**facts), make_data())


def test_refuses_foreign_checkpoints(make):
    with pytest.raises(ConfigError, match=r"model.weights"):
        make().on_load_checkpoint({"state_dict": {}})


def test_runs_in_mixed_precision(runs):
    module, _ = runs(precision="bf16-mixed", probe={"solver": "sgd", "recipe": {"epochs": 1}})
    state = module.model.state_dict()
    assert all(math.isfinite(v.float().sum()) for v in state.values())
    assert module.model.backbone.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (weights_of(0.5, 0.5, 0.5), "lambda_pull=0.5, lambda_kd=0.5, lambda_sft=0.5.*add up to 1"),
        (weights_of(-0.5, 1, 0.5), "lambda_pull=-0.5.*0 or above"),
        ({"adv_reference": "k"}, "adv_reference='k'.*j, i"),
        ({"perturb_bn": "off"}, "perturb_bn='off'.*eval, train"),
        ({"probe": {"solver": "knn"}}, r"probe\.solver='knn'.*sgd, lbfgs"),
        ({"recipe": {"epochs": 0}}, "epochs=0: it must be at least 1"),
        ({"recipe": {"batch_size": 1}}, r"recipe\.batch_size=1"),
        ({"recipe": {"lr": -0.02}}, "lr=-0.02: it must be at least 0"),
        ({"recipe": {"momentum": -0.1}}, "momentum=-0.1: it must be at least 0"),
        ({"recipe": {"weight_decay": -0.1}}, "weight_decay=-0.1: it must be at least 0"),
        ({"temperature": 0}, "temperature=0.*above 0"),
        ({"projection": {"lr": -0.1}}, r"projection\.lr=-0.1.*0 or above"),
        ({"probe": {"recipe": {"lr": -0.1}}}, "lr=-0.1: it must be at least 0"),
        ({"probe": {"recipe": {"batch_size": 0}}}, "batch_size=0: it must be at least 1"),
        ({"probe": {"c": 0}}, r"probe\.c=0.*above 0"),
        ({"pgd": {"steps": 0}}, "steps=0: it must be at least 1"),
    ],
)
def test_refuses_settings_out_of_range(make, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)
