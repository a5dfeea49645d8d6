import copy
import dataclasses
import math

import pytest
import torch
from grouping import make_of
from torch.nn import functional as F

from bdclean.attacks import BadNets
from bdclean.backbones import build, load_model
from bdclean.errors import ConfigError
from bdclean.functional.scan import analyse, rank_by_class
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Recipe
from bdclean.sifting import SCAn

# Small networks may flag the whole of a class.
pytestmark = pytest.mark.filterwarnings("ignore:More than 95% of the samples")

SMALL = {
    "width": 4,
    "recipe": Recipe(epochs=2, lr=0.02, batch_size=8, augmentation="crop"),
    "components": 4,
    "unlearn": {"epochs": 2, "lr": 0.01},
    "feature_batch_size": 5,
    "threshold": 0.6,
}
NEVER = {"threshold": 1e9}


@pytest.fixture
def make(facts):
    return lambda **arguments: make_of(SCAn, facts, SMALL, arguments)


@pytest.fixture
def make_poisoned(make_data):
    def build():
        data = make_data()
        data.attack = BadNets(rate=0.25, target=1)
        return data

    return build


@pytest.fixture
def fit(make, make_poisoned, make_trainer):
    def run(data=None, name="run", ckpt_path=None, callbacks=(), **arguments):
        torch.manual_seed(11)  # of the first weights
        module, data = make(**arguments), data or make_poisoned()
        make_trainer(*callbacks, name=name).fit(module, data, ckpt_path=ckpt_path)
        return module, data

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def backdoored(module):
    state = module.results.items()
    return {k.removeprefix("backdoored/"): v for k, v in state if k.startswith("backdoored/")}


# ---------------------------------------------------------------- stages


def test_outline(make):
    def stages(**arguments):
        return [stage.outline for stage in make(**arguments).plan()]

    first, last = [("train", 2), ("analyse", 0)], ("propose", 0)
    assert stages() == [*first, ("unlearn", 2), last]
    assert stages(repair="retrain") == [*first, ("retrain", 2), last]


def test_stages_read_what_they_should(fit):
    module, data = fit()
    flagged = module.results["flagged"]
    assert 0 < flagged.sum() < len(flagged) == 24
    training, last = data.asked[0], data.asked[-1]
    assert (training.role, training.labels, training.subset) == ("train", True, None)
    assert (training.augmentation, training.batch_size) == ("crop", 8)
    assert (last.role, last.labels, last.augmentation) == ("train", True, "none")
    assert last.subset.rows.tolist() == flagged.nonzero().flatten().tolist()
    assert last.subset.labels is None
    assert {role for role, _ in data.keys} == {"train"}  # the clean images are never trained on
    assert not same(backdoored(module), module.model.state_dict())


def test_retraining_starts_anew_on_what_is_left(fit, monkeypatch):
    first, step = {}, SCAn.cross_entropy

    def watched(module, batch):
        assert module.stage_name == "retrain"
        first.setdefault(module.seed, copy.deepcopy(module.model.state_dict()))
        return step(module, batch)

    monkeypatch.setattr(SCAn, "cross_entropy", watched)
    module, data = fit(repair="retrain")
    last = data.asked[-1]
    assert last.subset.rows.tolist() == (~module.results["flagged"]).nonzero().flatten().tolist()
    assert last.augmentation == "crop"
    assert not same(backdoored(module), module.model.state_dict())
    other, _ = fit(name="other", repair="retrain", seed=1)
    assert same(backdoored(module), backdoored(other))  # the seed is that of what comes after
    for seed in (0, 1):
        torch.manual_seed(derive_seed("scan retrain", seed))
        for name, parameter in build(module.model.info).named_parameters():
            assert torch.equal(parameter, first[seed][name]), name


def test_findings_are_those_of_the_formulas(fit, make_poisoned):
    module, data = fit()
    net = module.model.copy()
    net.load_state_dict(backdoored(module))
    net.eval()
    (clean,) = (data.role_images("probe", labels=True),)
    stored, shown = data.role_images("train", labels=False), data.plan.labels_seen
    everything = [
        images.__getitems__(list(range(len(images))))["image"].float() / 255
        for images in (stored, clean)
    ]
    with torch.no_grad():
        features, clean_features = (net.features(images) for images in everything)
    found = analyse(features, shown, clean_features, clean.columns["label"], 4, 0, 4)
    findings = module.findings()
    of_class = module.results["index_of_class"]
    torch.testing.assert_close(of_class, found.index, rtol=1e-3, atol=1e-3)
    assert torch.equal(findings.further["class_index"], of_class[shown].float())
    assert torch.equal(findings.flagged, found.minor & (of_class > 0.6)[shown])
    assert torch.equal(
        findings.score, rank_by_class(of_class, findings.further["margin"].double(), shown)
    )
    torch.testing.assert_close(findings.further["margin"].double(), found.margin, rtol=0, atol=0.01)
    # The class counts first: no sample of a class of lower index has a higher score.
    order = findings.score.sort().indices
    indices = of_class[shown][order]
    assert (indices.diff() >= 0).all()
    with torch.no_grad():
        named = module.model.copy().eval()(everything[0]).argmax(1)
    assert torch.equal(findings.proposed, torch.where(findings.flagged, named, -1))


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("repair", ["unlearn", "retrain"])
def test_resume_from_any_epoch_ends_the_same(repair, fit, every_epoch):
    whole, _ = fit(repair=repair, callbacks=[every_epoch])
    for epoch in range(4):
        path = f"{every_epoch.dirpath}/epoch={epoch}.ckpt"
        resumed, _ = fit(name="resumed", ckpt_path=path, repair=repair)
        assert same(resumed.model.state_dict(), whole.model.state_dict()), epoch
        assert same(resumed.results, whole.results), epoch


def test_the_truth_is_not_read(fit, make_poisoned):
    whole, first = fit()
    data = make_poisoned()
    clean = torch.arange(len(data.rows.train))
    clean = clean[~torch.isin(clean, data.plan.poison_index)]
    wrong = clean[: len(data.plan.poison_index)]
    overlay = data.poisoned_set.overlay  # the images stay, and only the truth is another
    plan = dataclasses.replace(data.plan, poison_index=wrong)
    data.poisoned_set = dataclasses.replace(data.poisoned_set, plan=plan)
    vars(data.poisoned_set)["overlay"] = overlay
    truth = data.training_set().poisoned
    assert not torch.equal(truth, first.training_set().poisoned)
    again, _ = fit(data, name="again")
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert same(again.results, whole.results)


def test_clean_labels_and_shown_labels_count(fit, make_poisoned, make_data):
    whole, _ = fit()
    other = make_data(shuffle_labels=True)
    other.attack = BadNets(rate=0.25, target=1)
    changed, _ = fit(other, name="other")
    assert not torch.equal(changed.results["score"], whole.results["score"])


# ---------------------------------------------------------------- nothing flagged


def test_nothing_flagged_leaves_the_network_alone(fit):
    module, data = fit(**NEVER, unlearn={"lr": 1.0}, unlearn_bn="train")
    assert not module.results["flagged"].any()
    assert same(backdoored(module), module.model.state_dict())
    assert len(data.asked[-1].subset.rows) == 8  # one batch per epoch, for form's sake
    assert module.protocol()["flagged_classes"] == []
    assert module.protocol()["num_flagged"] == 0


def test_nothing_flagged_retrains_on_everything(fit):
    module, data = fit(**NEVER, repair="retrain")
    assert len(data.asked[-1].subset.rows) == 24
    assert not same(backdoored(module), module.model.state_dict())
    other, _ = fit(name="other", **NEVER, repair="retrain", seed=1)
    assert same(backdoored(module), backdoored(other))
    assert not same(module.model.state_dict(), other.model.state_dict())  # other first weights


# ---------------------------------------------------------------- the ascent


@pytest.fixture
def ready(make):
    def build(**arguments):
        torch.manual_seed(3)
        module = make(**arguments)
        module.make_networks()
        module.results["flagged"] = torch.ones(6, dtype=torch.bool)
        module.log_terms = lambda **_: None
        return module

    return build


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_ascent_up_to_the_cap(ready, mode):
    module = ready(unlearn_bn=mode, ascent_cap=1.5)
    with torch.no_grad():
        module.model.head.weight.mul_(20)  # some samples are beyond the cap
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    net = module.model.copy()
    net.train(mode == "train")
    losses = F.cross_entropy(net(images), labels, reduction="none")
    cap = 1.5 * math.log(4)
    assert 0 < (losses > cap).sum() < 6
    before = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    loss = module.ascend_flagged({"image": images, "label": labels, "index": torch.arange(6)})
    assert loss.item() == pytest.approx(-torch.minimum(losses, torch.tensor(cap)).mean().item())
    moved = any(not torch.equal(b, before[name]) for name, b in module.model.named_buffers())
    assert moved == (mode == "train")
    loss.backward()
    # What is beyond the cap is left alone, and descent of the loss is ascent for the rest.
    wrong = net(images).softmax(1) - F.one_hot(labels, 4)
    torch.testing.assert_close(module.model.head.bias.grad, -wrong[losses < cap].sum(0) / 6)


# ---------------------------------------------------------------- records and wrong use


def test_record_and_files(fit, tmp_path):
    module, _ = fit()
    facts = module.protocol()
    assert facts["method"] == "scan"
    assert facts["labels"] == "untrusted + clean"
    assert facts["num_flagged"] == int(module.results["flagged"].sum())
    index = module.results["index_of_class"]
    assert facts["flagged_classes"] == [k for k in range(4) if index[k] > 0.6]
    assert facts["anomaly_index"] == pytest.approx(index.tolist(), abs=1e-3)
    module.save_artifacts(tmp_path)
    assert same(load_model(tmp_path / "backdoored.safetensors").state_dict(), backdoored(module))


def test_findings_wait_for_the_analysis(make):
    module = make()
    assert module.findings() is None
    assert "flagged_classes" not in module.protocol()


def test_too_few_clean_images(fit, make_poisoned):
    data = make_poisoned()
    data.splits = dataclasses.replace(data.splits, probe=4)
    with pytest.raises(
        ConfigError, match=r"Class 0 has 1 clean image; .*splits.probe to at least 8"
    ):
        fit(data)
    data = make_poisoned()
    data.splits = dataclasses.replace(data.splits, probe=0)
    with pytest.raises(ConfigError, match=r"^splits\.probe=0: the role probe has no images"):
        fit(data)


def test_warns_of_more_features_than_clean_images(fit):
    with pytest.warns(UserWarning, match="in 32 dimensions from 16 clean images"):
        fit(components=None)
    with pytest.raises(ConfigError, match=r"components=33: the features have 32 dimensions"):
        fit(components=33)


def test_two_classes_are_too_few(facts):
    with pytest.raises(ConfigError, match="two classes are equally far"):
        SCAn(dataclasses.replace(facts["facts"], num_classes=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repair": "none"}, "repair='none': it must be one of unlearn, retrain"),
        ({"unlearn_bn": "off"}, "unlearn_bn='off': it must be one of eval, train"),
        ({"threshold": 0}, "threshold=0: it must be above 0"),
        ({"components": 0}, "components=0: it must be above 0"),
        ({"unlearn": {"epochs": 0}}, "epochs=0: it must be at least 1"),
        ({"unlearn": {"lr": -1.0}}, "lr=-1.0: it must be at least 0"),
        ({"ascent_cap": 0.0}, "ascent_cap=0.0: it must be above 0"),
        ({"feature_batch_size": 0}, "feature_batch_size=0: it must be above 0"),
    ],
)
def test_refuses(make, wrong, message):
    with pytest.raises(ConfigError, match=message):
        make(**wrong)
