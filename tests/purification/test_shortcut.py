import pytest
import torch
from grouping import make_of
from torch.nn import functional as F

from bdclean.backbones import load_model, save_model
from bdclean.errors import ConfigError
from bdclean.functional.families import PROBES
from bdclean.purification import ShortcutDistillation
from bdclean.types import Subset

SMALL = {
    "recipe": {"epochs": 2, "batch_size": 12},
    "ball": {"steps": 1},
    "patch": {"steps": 1},
    "universal": {"steps": 1},
}


@pytest.fixture
def make(suspect, facts):
    return lambda **changes: make_of(
        ShortcutDistillation, facts, {"weights": suspect}, SMALL, changes
    )


@pytest.fixture
def ready(make):
    """A method with its networks, without a Trainer, and images."""

    def ready(**changes):
        module = make(**changes)
        module.make_networks()
        module.add_networks()
        return module, torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    return ready


def parameters(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_loss_by_hand(ready, monkeypatch):
    """Eq. (2), with the batch norm of the student over clean and perturbed images together."""
    module, x = ready(beta=0.5, temperature=3.0)
    logged = {}
    monkeypatch.setattr(module, "log_terms", lambda **terms: logged.update(terms))
    torch.manual_seed(5)
    loss = module.distil({"image": x})
    torch.manual_seed(5)
    with torch.no_grad():
        wanted = module.teacher(x)
    moved = module.perturbed(x, wanted)
    p = (wanted / 3).softmax(1)
    clean, perturbed = module.model(torch.cat([x, moved])).chunk(2)
    kl = [
        9 * F.kl_div((z / 3).log_softmax(1), p, reduction="batchmean") for z in (clean, perturbed)
    ]
    torch.testing.assert_close(loss, kl[0] + 0.5 * kl[1])
    torch.testing.assert_close(logged["keep"], kl[0])
    torch.testing.assert_close(logged["unlearn"], kl[1])
    loss.backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    assert all(p.grad is not None for p in module.model.parameters())


def test_each_family_has_its_share_of_the_batch(ready):
    module, x = ready()
    wanted = module.outputs(module.teacher, x)
    ball, patch, universal = (module.perturbed(x, wanted) - x).split(4)
    assert ball.abs().max() <= 8 / 255 + 1e-6
    assert all(0 < (image.abs().amax(0) > 0).float().mean() < 0.2 for image in patch)
    assert (universal.abs().amax(1) > 0).float().mean() > 0.9
    assert 4 / 255 - 1e-6 < universal.abs().max() < 12 / 255 + 1e-6


def test_the_perturbation_looks_at_the_suspect_alone(ready):
    def perturbed(module, x):
        torch.manual_seed(2)
        return module.perturbed(x, module.outputs(module.teacher, x))

    for perturb, same in ("suspect", True), ("student", False):
        module, x = ready(perturb=perturb)
        first = perturbed(module, x)
        with torch.no_grad():
            for weight in module.model.parameters():
                weight += 0.3 * torch.randn_like(weight)
        assert torch.equal(first, perturbed(module, x)) == same, perturb


def test_a_second_fit_perturbs_by_its_own_suspect(ready):
    def perturbed(module, x):
        torch.manual_seed(2)
        return module.perturbed(x, module.outputs(module.teacher, x))

    used, x = ready()
    first = perturbed(used, x)
    fresh, _ = ready()
    used.make_networks()
    used.add_networks()
    for module in used, fresh:
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in module.teacher.parameters():
                weight.copy_(torch.randn_like(weight))
    assert torch.equal(perturbed(used, x), perturbed(fresh, x))
    assert not torch.equal(perturbed(used, x), first)


def test_weights_count_flips(ready, monkeypatch):
    module, _ = ready()
    wanted = F.one_hot(torch.tensor([0, 0, 1, 2, 3, 3]), 4).float()
    after = F.one_hot(torch.tensor([0, 1, 1, 1, 1, 0]), 4).float()
    monkeypatch.setattr(module, "outputs", lambda *_: after)
    for weighting, counted in (
        ("all", [1, 1, 1, 1, 1, 1]),
        ("flipped", [0, 1, 0, 1, 1, 1]),
        ("favourite", [0, 1, 0, 1, 1, 0]),
    ):
        module.weighting = weighting
        assert module.weights(wanted, after).tolist() == counted
    monkeypatch.setattr(module, "outputs", lambda *_: wanted)
    assert module.weights(wanted, after).sum() == 0  # nothing flips


def test_without_a_head_features_are_distilled(suspect, make, make_data, make_trainer, tmp_path):
    """The student stays in the suspect's feature space, so no head has to be made."""
    model = load_model(suspect)
    model.replace_head(None)
    save_model(model, tmp_path / "backbone.safetensors")
    module = make(weights=str(tmp_path / "backbone.safetensors"))
    make_trainer().fit(module, make_data())
    assert module.model.head is None
    a, b = torch.rand(5, 3), torch.rand(5, 3)
    wanted = (a - b).square().sum(1) / a.square().sum(1).mean()
    torch.testing.assert_close(module.distance(a, b), wanted)
    facts = module.details()
    assert 0 < facts["feature_cosine"] <= 1
    assert facts["concentration"] == {}
    refused = make(weights=str(tmp_path / "backbone.safetensors"), weighting="flipped")
    with pytest.raises(ConfigError, match="weighting=flipped: the suspect has no classifier head"):
        make_trainer(name="refused").fit(refused, make_data())


def test_the_record_tells_what_was_measured_without_labels(make, make_data, make_trainer):
    module, data = make(held_out=0.25), make_data()
    trainer = make_trainer()
    trainer.fit(module, data)
    facts = module.details()
    assert facts["finished"]
    assert facts["concentration"].keys() == {"ball", "patch", "universal"}
    assert facts["families"] == ["ball", "patch", "universal"]
    assert facts["beta"][0] == 1
    assert len(facts["beta"]) == 2
    held = module.hold_out(0.25, 0)[1].rows
    assert module.results["suspect"].shape == (4, len(held))
    images = data.role_images("defense", labels=False).shown(held).float() / 255
    with torch.no_grad():
        answers = [net.eval()(images).argmax(1) for net in (module.teacher, module.model)]
    assert torch.equal(module.results["suspect"][0], answers[0])
    assert torch.equal(module.results["student"][0], answers[1])
    assert facts["agreement"] == pytest.approx((answers[0] == answers[1]).float().mean().item())
    assert trainer.callback_metrics["held_out/agreement"] == pytest.approx(facts["agreement"])
    trained = {len(view.subset.rows) for view in data.asked if view.augmentation != "none"}
    assert trained == {len(module.hold_out(0.25, 0)[0].rows)}


def test_families_in_which_flips_pile_up_are_chosen(ready, monkeypatch):
    """A stub of the suspect: of 40 images so many are sent to class 2 (or 1) by each probe."""
    module, _ = ready()
    monkeypatch.setattr("bdclean.purification.shortcut.LEAST_CLASSES", 4)
    monkeypatch.setattr(module, "hold_out", lambda *_: (Subset(torch.arange(0, 1000, 2)), None))
    asked, sent = [], []

    def answers(model, families, rows, seed):
        asked.append((model, tuple(families), rows.rows))
        classes = torch.zeros(5, 500, dtype=torch.long)
        for row, (share, where) in enumerate(sent, 1):
            classes[row, : round(share * 500)] = where
        yield from torch.eye(4)[classes].split(128, dim=1)

    monkeypatch.setattr(module, "answers", answers)
    for probes, chosen in (
        ([(0.9, 2), (0.2, 1), (0.1, 2), (0.2, 2)], ["ball"]),
        ([(0.2, 2), (0.2, 1), (0.4, 2), (0.9, 2)], ["universal"]),
        ([(0.9, 2), (0.4, 1), (0.1, 2), (0.9, 2)], ["ball", "universal"]),  # patch: another class
        ([(0.2, 2), (0.2, 1), (0.1, 2), (0.5, 2)], ["ball", "patch", "universal"]),  # none
    ):
        sent[:] = probes
        module.choose_families()
        assert list(module.chosen) == chosen
    model, families, rows = asked[0]
    assert model is module.teacher
    assert families == tuple(PROBES)
    assert len(rows) == 500
    module.choose = False
    module.choose_families()
    few = (Subset(torch.arange(99)), None)
    monkeypatch.setattr(module, "hold_out", lambda *_: few)
    module.choose = True
    module.choose_families()
    assert len(asked) == 4
    assert list(module.chosen) == ["ball", "patch", "universal"]


def test_families_in_which_features_gather_are_chosen_without_a_head(ready, monkeypatch):
    module, _ = ready()
    module.model.head = None
    monkeypatch.setattr(module, "hold_out", lambda *_: (Subset(torch.arange(200)), None))
    before = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    target, other = 9 * torch.eye(32)[:2]
    sent: list = []
    monkeypatch.setattr(
        module, "answers", lambda *_: iter([torch.stack([before, *(before + x for x in sent)])])
    )
    for moved, chosen in (
        ([0, target, 0, 0], ["patch"]),
        ([target, other / 2, 0, target], ["ball", "universal"]),  # patch: another point
        ([0, 0, 0, 0], ["ball", "patch", "universal"]),
    ):
        sent[:] = [torch.as_tensor(x).expand(200, 32) for x in moved]
        module.choose_families()
        assert list(module.chosen) == chosen


def test_a_family_that_is_left_out_is_not_chosen(ready, monkeypatch):
    module, x = ready(ball=None, patch=None)
    module.results["chosen"] = torch.tensor([True])
    moved = module.perturbed(x, module.outputs(module.teacher, x)) - x
    assert ((moved.abs().amax(1) > 0).float().mean((1, 2)) > 0.9).all()


def test_beta_follows_the_agreement(ready):
    module, _ = ready(beta=0.8, least_agreement=0.9)
    path = ((0.8, 0.4), (0.89, 0.2), (0.9, 0.4), (0.95, 0.8), (0.95, 0.8))
    for epoch, (agreement, beta) in enumerate(path):
        for seen in 0.1, agreement:  # the first time the epoch was stopped
            module.results["agreement"] = torch.tensor(seen, dtype=torch.float64)
            module.follow_agreement(epoch)
        assert module.betas[-1] == pytest.approx(beta)
    assert module.betas == pytest.approx([0.8, 0.4, 0.2, 0.4, 0.8, 0.8])
    module.least_agreement = None
    module.results["agreement"] = torch.tensor(0.0)
    module.follow_agreement(5)
    assert module.betas[-1] == pytest.approx(0.8)


def test_there_is_a_family(make):
    with pytest.raises(ConfigError, match="ball, patch and universal are all null"):
        make(ball=None, patch=None, universal=None)
