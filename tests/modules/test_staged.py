"""A fit of several stages: order, resume in each of them, and what is refused."""

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from bdclean.errors import ConfigError
from bdclean.modules import Needs, Recipe, Stage
from bdclean.purification import Purifier
from bdclean.types import View


class Toy(Purifier):
    """Score (computes), shrink (SGD, noise), sift (computes), fit (Adam, other images)."""

    name = "toy"
    needs = Needs(labels=("clean",))

    def __init__(self, facts, weights=None, shrink=2, fit=2, cut=9):
        super().__init__(facts, weights)
        self.save_arguments()
        self.shrink, self.fit, self.cut = shrink, fit, cut
        self.begun, self.seen = [], []

    def plan(self):
        shrink = Recipe(
            epochs=self.shrink, lr=0.01, weight_decay=0.0, batch_size=8, augmentation="weak"
        )
        fit = Recipe(batch_size=4, augmentation="weak")
        plan = (
            Stage("score", begin=self.score),
            Stage("shrink", shrink, reads=lambda: shrink.view("defense"), step=self.shrink_step),
            Stage("sift", begin=self.sift),
            Stage(
                "fit",
                epochs=self.fit,
                begin=lambda: self.begun.append("fit"),
                reads=lambda: fit.view("probe", labels=True),
                step=self.fit_step,
                optimizer=lambda: torch.optim.Adam(self.model.parameters(), 1e-3),
            ),
        )
        return plan[: self.cut]

    def score(self):
        self.begun.append("score")
        batches = self.read(View("defense", batch_size=10))
        with torch.no_grad():
            scores = [self.teacher(batch["image"]).float().amax(1) for batch in batches]
        self.results["score"] = torch.cat(scores)

    def shrink_step(self, batch):
        self.seen.append(("shrink", self.stage_epoch, "label" in batch))
        noise = torch.randn_like(batch["image"])  # of the global generator
        return self.model(batch["image"] + 0.01 * noise).square().mean()

    def sift(self):
        self.begun.append("sift")
        assert self.model.training
        self.results["best"] = self.results["score"].topk(3).indices

    def fit_step(self, batch):
        self.seen.append(("fit", self.stage_epoch, "label" in batch))
        return torch.nn.functional.cross_entropy(self.model(batch["image"]), batch["label"])


class Optimizers(Callback):
    def __init__(self):
        self.used = []

    def on_train_epoch_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.used.append(type(optimizer).__name__)


@pytest.fixture
def make(suspect, facts):
    return lambda **arguments: Toy(**facts, weights=suspect, **arguments)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_stages_run_in_order_with_their_view_and_optimizer(make, make_data, make_trainer):
    module, data, optimizers = make(), make_data(), Optimizers()
    trainer = make_trainer(optimizers)
    trainer.fit(module, data)
    assert module.begun == ["score", "sift", "fit"]
    assert optimizers.used == ["SGD", "SGD", "Adam", "Adam"]
    # 24 images by 8 are 3 steps, 16 by 4 are 4 steps; labels only where they were asked for.
    assert module.seen == (
        [("shrink", 0, False)] * 3
        + [("shrink", 1, False)] * 3
        + [("fit", 0, True)] * 4
        + [("fit", 1, True)] * 4
    )
    assert trainer.current_epoch == 4
    assert module.results["score"].shape == (24,)
    assert {role for role, _ in data.keys} == {"defense", "probe"}


def test_schedule_spans_its_stage(make, make_data, make_trainer):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    make_trainer(Rates()).fit(make(), make_data())
    wanted = [0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates[:6] == pytest.approx(wanted)
    assert rates[6:] == [1e-3] * 8


def test_resume_from_any_epoch_ends_with_the_same_weights(
    make, make_data, make_trainer, every_epoch
):
    whole = make()
    make_trainer(every_epoch).fit(whole, make_data())
    stages = []
    for epoch in range(4):
        path = f"{every_epoch.dirpath}/epoch={epoch}.ckpt"
        stages.append(torch.load(path, weights_only=True)["bdclean"]["stage"])
        resumed = make()
        make_trainer(name="resumed").fit(resumed, make_data(), ckpt_path=path)
        assert same(resumed, whole)
        assert torch.equal(resumed.results["score"], whole.results["score"])
        assert torch.equal(resumed.results["best"], whole.results["best"])
        assert resumed.begun == ["sift", "fit"][: 2 * (epoch == 0)]
        assert len(resumed.seen) == [11, 8, 4, 0][epoch]
    assert stages == [1, 3, 3, 4]


def test_resume_from_any_step_ends_with_the_same_weights(make, make_data, make_trainer, tmp_path):
    # Step 6 is the last batch of a stage: the checkpoint was written before the stage changed.
    whole = make()
    callback = ModelCheckpoint(
        tmp_path / "steps", filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    make_trainer(callback).fit(whole, make_data())
    for step in (2, 3, 6, 8):
        resumed = make()
        path = tmp_path / "steps" / f"step={step}.ckpt"
        make_trainer(name="resumed").fit(resumed, make_data(), ckpt_path=path)
        assert same(resumed, whole), step
        assert len(resumed.seen) == 14 - step


@pytest.mark.parametrize("step", [1, 4, 6, 8, 13])
def test_a_run_that_is_stopped_has_not_finished_and_goes_on_where_it_was(
    step, make, make_data, make_trainer, cut
):
    whole = make()
    make_trainer().fit(whole, make_data())
    assert whole.finished
    stopped = make()
    path = cut(stopped, make_data(), step)
    assert not stopped.protocol()["finished"]
    resumed = make()
    make_trainer(name="resumed").fit(resumed, make_data(), ckpt_path=path)
    assert len(resumed.seen) == 14 - step
    assert same(resumed, whole)
    assert resumed.protocol()["finished"]


@pytest.mark.parametrize(
    ("epoch", "before", "now", "message"),
    [
        (2, {"fit": 2}, {"fit": 3}, "Stage 4 .* fit, 2 epochs; of this run: fit, 3 epochs"),
        (2, {"shrink": 2}, {"shrink": 1}, "Stage 2 .* shrink, 2 epochs; .* shrink, 1 epochs"),
        (1, {"cut": 3}, {}, "Stage 4 .* run: none; of this run: fit, 2 epochs"),
    ],
    ids=["a stage that has begun", "one that is over", "a finished run"],
)
def test_refuses_to_resume_what_had_other_stages(
    epoch, before, now, message, make, make_data, make_trainer, every_epoch
):
    make_trainer(every_epoch).fit(make(**before), make_data())
    path = f"{every_epoch.dirpath}/epoch={epoch}.ckpt"
    with pytest.raises(ConfigError, match=message):
        make_trainer(name="resumed").fit(make(**now), make_data(), ckpt_path=path)


def test_a_checkpoint_of_an_earlier_version_is_not_resumed(
    make, make_data, make_trainer, every_epoch
):
    make_trainer(every_epoch).fit(make(), make_data())
    path = f"{every_epoch.dirpath}/epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["bdclean_stages"] = checkpoint.pop("bdclean")
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match="of an earlier version"):
        make_trainer(name="resumed").fit(make(), make_data(), ckpt_path=path)


def test_a_checkpoint_of_another_method_is_not_resumed(make, make_data, make_trainer, every_epoch):
    class Other(Toy):
        name = "other"

    made = make()
    make_trainer(every_epoch).fit(made, make_data())
    path, other = f"{every_epoch.dirpath}/epoch=1.ckpt", Other(made.facts, made.source.weights)
    message = "was written by toy, and this is other.*--model.weights"
    with pytest.raises(ConfigError, match=message):
        make_trainer(name="resumed").fit(other, make_data(), ckpt_path=path)
    with pytest.raises(ConfigError, match=message):
        make_trainer(name="test").test(other, make_data(), ckpt_path=path, verbose=False)


def test_a_checkpoint_has_one_entry_of_ours(make, make_data, make_trainer, every_epoch):
    module = make()
    make_trainer(every_epoch).fit(module, make_data())
    checkpoint = torch.load(f"{every_epoch.dirpath}/epoch=1.ckpt", weights_only=True)
    assert [key for key in checkpoint if "bdclean" in key] == ["bdclean"]
    record = checkpoint["bdclean"]
    assert record.keys() == {"method", "networks", "plan", "stage", "steps", "results"}
    assert record["method"] == "toy"
    assert record["networks"].keys() == {"model", "teacher"}
    assert record["networks"]["model"] == module.model.info.to_metadata()
    assert record["plan"] == [("score", 0), ("shrink", 2), ("sift", 0), ("fit", 2)]
    assert (record["stage"], record["steps"]) == (3, 4)
    assert record["results"].keys() == {"score", "best"}


def test_a_run_whose_epochs_have_other_steps_is_not_resumed(
    make, make_data, make_trainer, every_epoch
):
    make_trainer(every_epoch).fit(make(), make_data())
    limited = make_trainer(name="resumed", limit_train_batches=2)
    message = "run has 3 steps, and one of this run 2"
    with pytest.raises(ConfigError, match=message):
        limited.fit(make(), make_data(), ckpt_path=f"{every_epoch.dirpath}/epoch=0.ckpt")


def test_stages_that_have_not_begun_may_change(make, make_data, make_trainer, every_epoch):
    make_trainer(every_epoch).fit(make(), make_data())
    resumed = make(fit=3)
    path = f"{every_epoch.dirpath}/epoch=0.ckpt"
    make_trainer(name="resumed").fit(resumed, make_data(), ckpt_path=path)
    assert [name for name, *_ in resumed.seen].count("fit") == 12


def test_a_second_fit_starts_from_the_file(make, make_data, make_trainer):
    module = make()
    make_trainer().fit(module, make_data())
    first = copy.deepcopy(module.model.state_dict())
    make_trainer(name="again").fit(module, make_data())
    assert module.begun == ["score", "sift", "fit"] * 2
    assert all(torch.equal(first[key], value) for key, value in module.model.state_dict().items())


def test_teacher_stays_as_it_was(make, make_data, make_trainer):
    module = make()
    make_trainer().fit(module, make_data())
    suspect = module.source.load().state_dict()
    assert not any(m.training for m in module.teacher.modules())
    assert all(not p.requires_grad for p in module.teacher.parameters())
    assert all(
        torch.equal(suspect[key], value) for key, value in module.teacher.state_dict().items()
    )
    assert not same(module.teacher, module.model)
    storages = [
        {t.data_ptr() for t in net.state_dict().values()} for net in (module.model, module.teacher)
    ]
    assert not storages[0] & storages[1]


def test_refuses_loaders_that_are_not_renewed(make, make_data, make_trainer):
    trainer = make_trainer(reload_dataloaders_every_n_epochs=0)
    with pytest.raises(ConfigError, match=r"trainer.reload_dataloaders_every_n_epochs=0.*to 1"):
        trainer.fit(make(), make_data())


@pytest.mark.parametrize("max_epochs", [4, 1000])
def test_max_epochs_may_be_left_alone_or_agree(max_epochs, make, make_data, make_trainer):
    trainer = make_trainer(max_epochs=max_epochs)
    trainer.fit(make(), make_data())
    assert trainer.current_epoch == 4


def test_refuses_other_max_epochs(make, make_data, make_trainer):
    with pytest.raises(ConfigError, match=r"trainer.max_epochs=7.* 4 epochs"):
        make_trainer(max_epochs=7).fit(make(), make_data())


def test_refuses_plain_loaders(make, make_trainer):
    loader = torch.utils.data.DataLoader(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ConfigError, match="needs a data module with set_view"):
        make_trainer().fit(make(), loader)


def test_refuses_fit_without_weights(facts, make_data, make_trainer):
    with pytest.raises(ConfigError, match=r"model.weights is not set"):
        make_trainer().fit(Toy(**facts), make_data())


def test_development_run_keeps_its_limit(make, make_data, make_trainer):
    module = make()
    make_trainer(max_epochs=None, fast_dev_run=True).fit(module, make_data())
    assert len(module.seen) == 1


class NoStep(Toy):
    """Its stage takes the cross-entropy, and its view has no labels."""

    def plan(self):
        recipe = Recipe(epochs=1, batch_size=8)
        return (Stage("only", recipe, reads=lambda: recipe.view("defense")),)


def test_a_stage_without_step_needs_labels(suspect, facts, make_data, make_trainer):
    message = (
        "NoStep: the stage only takes the cross-entropy with labels, .*give the stage a `step`"
    )
    with pytest.raises(ConfigError, match=message):
        make_trainer().fit(NoStep(**facts, weights=suspect), make_data())


@pytest.mark.parametrize("plan", [None, 3, "fit", ["fit"], (None,)])
def test_a_plan_that_is_none_is_told(plan, make, make_data, make_trainer):
    class Planless(Toy):
        def plan(self):
            return plan

    made = make()
    made.__class__ = Planless
    message = r"Planless: plan\(\) must return a tuple of stages, and it returned"
    with pytest.raises(ConfigError, match=message):
        make_trainer().fit(made, make_data())
    with pytest.raises(ConfigError, match=message):
        _ = made.finished


def test_a_plan_may_be_a_list(make, make_data, make_trainer):
    class Listed(Toy):
        def plan(self):
            return list(super().plan())

    made = make()
    made.__class__ = Listed
    make_trainer().fit(made, make_data())
    assert made.finished


def test_refusals_name_the_checkpoint(make, make_data, make_trainer, every_epoch):
    make_trainer(every_epoch).fit(make(), make_data())
    path = f"{every_epoch.dirpath}/epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    record = checkpoint["bdclean"]
    spoilt = {
        "of an earlier version": None,
        "was written by other": record | {"method": "other"},
        "is damaged": record | {"stage": 99},
        "Stage 2 of the checkpoint": record | {"plan": [("score", 0), ("shrink", 9)]},
        "has 7 steps": record | {"steps": 7},
    }
    for told, other in spoilt.items():
        torch.save(checkpoint | {"bdclean": other}, path)
        with pytest.raises(ConfigError, match=f"^--ckpt_path {path}: .*{told}"):
            make_trainer(name="resumed").fit(make(), make_data(), ckpt_path=path)
