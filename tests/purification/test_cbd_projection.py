"""CBD through a projection head, as for self-supervised ImageNet backbones."""

import copy

import pytest
import torch
from grouping import make_of

from bdclean.purification import CBD

SMALL = {"recipe": {"epochs": 2, "batch_size": 8}, "pgd": {"steps": 2}, "probe": None}
PRETRAIN = {"mode": "pretrain", "epochs": 2}


@pytest.fixture
def run(make_trainer, make_data, suspect, facts):
    def run(*callbacks, ckpt_path=None, cls=CBD, **arguments):
        torch.manual_seed(4)
        module = make_of(cls, facts, {"weights": suspect}, SMALL, arguments)
        trainer = make_trainer(*callbacks)
        trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
        return module

    return run


class Watched(CBD):
    """Keeps the state of everything at the turns of the plan."""

    def on_train_start(self):
        super().on_train_start()
        self.start = copy.deepcopy(self.state_dict())

    def take_projection(self):
        super().take_projection()
        self.middle = copy.deepcopy(self.state_dict())


def changed(before, after, prefix):
    return {k for k, v in before.items() if k.startswith(prefix) and not torch.equal(v, after[k])}


def test_plan(facts, suspect):
    def outline(projection):
        module = make_of(CBD, facts, {"weights": suspect}, SMALL, {"projection": projection})
        return [stage.outline for stage in module.plan()]

    assert outline(PRETRAIN) == [("project", 2), ("purify", 2)]
    assert outline({"mode": "joint"}) == outline(None) == [("purify", 2)]


def test_pretraining_moves_the_projection_alone(run):
    module = run(cls=Watched, projection=PRETRAIN)
    # the backbone's batch norm statistics included
    assert changed(module.start, module.middle, "model.") == set()
    assert changed(module.start, module.middle, "teacher.") == set()
    weights = {f"projections.student.layers.{i}.weight" for i in (0, 1, 3)}
    assert weights <= changed(module.start, module.middle, "projections.student.")
    end = module.state_dict()
    for key in [k for k in end if k.startswith("projections.teacher.")]:
        student = key.replace("teacher", "student")
        assert torch.equal(module.middle[key], module.middle[student])  # taken over
        assert torch.equal(module.middle[key], end[key])  # and constant from then on
    assert weights <= changed(module.middle, end, "projections.student.")
    assert changed(module.middle, end, "model.backbone.conv1")


def test_joint_training_starts_from_a_drawn_projection(run):
    module = run(cls=Watched, projection={"mode": "joint"})
    end = module.state_dict()
    for key in [k for k in end if k.startswith("projections.teacher.")]:
        assert torch.equal(module.middle[key], end[key])
    assert changed(module.middle, end, "projections.student.")


@pytest.mark.parametrize("projection", [PRETRAIN, {"mode": "joint"}])
def test_the_product_has_no_projection(run, projection):
    module = run(projection=projection)
    assert module.product().head is None
    assert not any("projection" in key for key in module.product().state_dict())
    assert module.product().num_features == 32


def test_the_terms_are_those_of_projected_features(run, monkeypatch):
    module = run(projection={"mode": "joint"}, recipe={"epochs": 1})
    monkeypatch.setattr(module, "perturbed", lambda images, reference: images)
    logged = {}
    monkeypatch.setattr(module, "log_terms", logged.update)
    generator = torch.Generator().manual_seed(11)
    views = tuple(torch.rand(6, 3, 8, 8, generator=generator) for _ in range(3))
    oracle, h, fixed = (
        copy.deepcopy(m)
        for m in (module.model, module.projections.student, module.projections.teacher)
    )
    oracle.train()
    module.model.train()
    module.purify({"views": views})
    z_i, z_j = h(oracle.features(torch.cat(views[:2]))).chunk(2)
    z_a = h(oracle.features(views[2]))
    t_i = fixed(module.teacher.features(views[0]))
    assert z_i.shape == (6, 128)
    wanted = {
        "sft": module.contrast(z_i, z_j),
        "kd": module.contrast(z_i, t_i),
        "pull": module.contrast(z_i, z_a),
    }
    for name, value in wanted.items():
        assert torch.allclose(logged[name], value, atol=1e-5), name


@pytest.mark.parametrize("perturb_bn", ["eval", "train"])
def test_a_perturbation_leaves_the_projection_as_it_was(run, perturb_bn):
    module = run(projection={"mode": "joint"}, recipe={"epochs": 1}, perturb_bn=perturb_bn)
    module._perturber = None
    before = copy.deepcopy(module.projections.state_dict())
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    moved = module.perturbed(images, images.flip(0))
    assert not torch.equal(moved, images)
    after = module.projections.state_dict()
    # the count of batches moves with every pass in training mode
    assert {k for k in before if not torch.equal(before[k], after[k])} <= {
        k for k in before if k.endswith("num_batches_tracked")
    }
    assert module.projections.student.training
    assert not module.projections.teacher.training


def test_the_perturbation_climbs_the_loss_of_projected_features(run):
    module = run(projection={"mode": "joint"}, recipe={"epochs": 1})
    module._perturber = None
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    moved = module.perturbed(images, images)
    module.model.eval()
    module.projections.eval()

    def loss(x):
        with torch.no_grad():
            clean, other = (module.projections(module.model.features(v)) for v in (images, x))
        return module.contrast(other, clean)

    assert loss(moved) > loss(images) + 1e-3


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resume_in_every_stage_ends_with_the_same_weights(run, every_epoch, tmp_path, epoch):
    whole = run(every_epoch, projection=PRETRAIN)
    again = run(ckpt_path=tmp_path / "checkpoints" / f"epoch={epoch}.ckpt", projection=PRETRAIN)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_autocast_leaves_the_projection_its_gradient(facts, suspect):
    """Casts of weights that autocast keeps from a pass without gradients must not serve others."""

    def gradients(enabled):
        torch.manual_seed(6)
        arguments = {"projection": {"mode": "joint"}, "pgd": {"steps": 2, "random_start": False}}
        module = make_of(CBD, facts, {"weights": suspect}, SMALL, arguments)
        source = module.source.load()
        module.install(model=module.make_student(source), teacher=source.copy())
        module.add_networks()
        module.log_terms = lambda **_: None
        views = tuple(torch.rand(8, 3, 8, 8) for _ in module.view_names)
        batch = {"image": views[0], "index": torch.arange(8), "views": views}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module.purify(batch)
        loss.backward()
        # weights alone: a bias before a batch norm has no gradient but noise
        head = [p for p in module.projections.student.parameters() if p.ndim > 1]
        return [p.grad for p in (*head, module.model.backbone.conv1.weight)]

    for coarse, fine in zip(gradients(True), gradients(False), strict=True):
        assert coarse is not None
        assert fine.abs().max() > 0
        likeness = torch.nn.functional.cosine_similarity(coarse.flatten(), fine.flatten(), dim=0)
        assert likeness > 0.8
