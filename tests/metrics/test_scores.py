"""The container of one evaluation: which batch goes to which metric, and what a key means."""

import pytest
import torch

from bdclean.metrics import AttackSuccessRate, CleanAccuracy, PoisonedAccuracy, SuccessFloor
from bdclean.metrics.backdoor import HitRate
from bdclean.metrics.scores import DEFINITIONS, METRICS, Scores

CPU = torch.device("cpu")


def batch(label, target=None):
    filled = {"image": torch.zeros(len(label), 3, 2, 2), "index": torch.arange(len(label))}
    filled["label"] = torch.tensor(label)
    return filled if target is None else filled | {"target": torch.tensor(target)}


def named(*classes):
    return torch.tensor(classes)


@pytest.fixture
def scores():
    made = Scores()
    made.start((), CPU)
    return made


def values(scores):
    return {key: metric.compute().item() for key, metric in scores.items() if metric.count}


def test_a_metric_says_what_it_measures_and_where():
    found = {metric.key: (metric.loader, metric.reads) for metric in METRICS}
    assert found == {
        "acc": ("clean", ("label",)),
        "asr": ("triggered", ("label", "target")),
        "asr_floor": ("clean", ("target",)),
        "pa": ("triggered", ("label", "target")),
    }
    assert (CleanAccuracy, AttackSuccessRate, SuccessFloor, PoisonedAccuracy) == METRICS
    assert DEFINITIONS == {
        "acc": "percent of clean test images classified as their true class, micro-averaged",
        "asr": "percent of triggered test images, true class eligible, classified as the "
        "attacker's",
        "asr_floor": "percent of the same images without the trigger classified as the attacker's",
        "pa": "percent of the same triggered images classified as their true class",
    }
    # metrics of equal states are merged by `MetricCollection`
    assert len({metric.hits_state for metric in METRICS}) == len(METRICS)
    assert all(issubclass(metric, HitRate) for metric in METRICS)


def test_a_batch_goes_to_the_metrics_of_its_loader(scores):
    assert [key for key, _ in scores.items()] == ["acc", "asr", "asr_floor", "pa"]
    scores.update("clean", named(0, 1, 2, 3), batch([0, 1, 2, 0]))
    assert values(scores) == {"acc": 75.0}
    scores.update("triggered", named(0, 0, 2, 3), batch([1, 2, 2, 1], [0, 0, 0, 0]))
    assert values(scores) == {"acc": 75.0, "asr": 50.0, "pa": 25.0}
    assert scores.counts() == {"clean": 4, "triggered": 4}
    scores.update("clean", named(0, 1, 0), batch([1, 1, 0], [0, 0, -1]))
    assert values(scores)["asr_floor"] == 50.0  # of the two that count


def test_logits_and_classes_count_alike(scores):
    scores.update("clean", torch.eye(4)[[0, 1, 2, 3]], batch([0, 1, 2, 0]))
    assert values(scores) == {"acc": 75.0}


def test_a_further_loader_has_a_rate_of_its_own(scores):
    scores.start(["leak", "cross_acc"], CPU)
    assert [key for key, _ in scores.items()] == [
        "acc",
        "asr",
        "asr_floor",
        "pa",
        "leak",
        "cross_acc",
    ]
    scores.update("leak", named(0, 0, 1), batch([1, 2, 1], [0, 0, 0]))
    assert values(scores) == {"leak": pytest.approx(200 / 3)}
    scores.update("cross_acc", named(1, 1), batch([1, 2], [1, 2]))
    assert values(scores)["cross_acc"] == 50.0
    assert scores.counts() == {"clean": 0, "triggered": 0, "leak": 3, "cross_acc": 2}
    with pytest.raises(KeyError):  # a batch without `target` is none of a further loader
        scores.update("leak", named(0), batch([0]))


def test_an_evaluation_starts_from_zero_and_keeps_its_metrics(scores):
    scores.start(["leak"], CPU)
    before = dict(scores.items())
    scores.update("clean", named(0), batch([0]))
    scores.update("leak", named(0), batch([1], [0]))
    scores.start(["leak"], CPU)
    assert scores.counts() == {"clean": 0, "triggered": 0, "leak": 0}
    assert dict(scores.items()) == before  # Lightning knows a metric by its identity
    assert all(metric is before[key] for key, metric in scores.items())
    scores.start([], CPU)
    assert [key for key, _ in scores.items()] == ["acc", "asr", "asr_floor", "pa"]
