import json
import math
from dataclasses import replace

import pytest
import torch
from sklearn import metrics as oracle

from bdclean.errors import DataError
from bdclean.metrics.identification import (
    auroc,
    average_precision,
    confusion,
    f1,
    false_positive_rate,
    identification,
    precision,
    true_positive_rate,
)
from bdclean.types import Findings, TrainingSet


def drawn(seed, size=200, levels=None):
    """Scores (with ties, if they have only some levels), a truth that they tell of, and flags."""
    generator = torch.Generator().manual_seed(seed)
    poisoned = torch.rand(size, generator=generator) < 0.2
    score = torch.randn(size, generator=generator) + poisoned
    if levels:
        score = (score * levels).round() / levels
    return score, poisoned, score > 0.8


def make_findings(flagged, score=None, rounds=None, **further):
    size = len(flagged)
    return Findings(
        score=torch.arange(size).float() if score is None else score,
        flagged=flagged,
        proposed=torch.full((size,), -1),
        further=further,
        rounds=torch.zeros(0, size, dtype=torch.bool) if rounds is None else rounds,
        round_epochs=torch.arange(0 if rounds is None else len(rounds)),
    )


def make_data(poisoned, covers=None):
    return TrainingSet(torch.zeros(len(poisoned)).long(), (), poisoned, covers)


def mask(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_the_hand_made_table():
    flagged = mask(1, 1, 1, 0, 0, 0, 0, 0, 0, 0)
    poisoned = mask(1, 1, 0, 1, 1, 0, 0, 0, 0, 0)
    assert confusion(flagged, poisoned) == {"tp": 2, "fp": 1, "fn": 2, "tn": 5}
    assert true_positive_rate(flagged, poisoned) == 50
    assert false_positive_rate(flagged, poisoned) == pytest.approx(100 / 6)
    assert precision(flagged, poisoned) == pytest.approx(200 / 3)
    assert f1(flagged, poisoned) == pytest.approx(400 / 7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [None, 1, 4])
def test_all_agree_with_scikit_learn(seed, levels):
    score, poisoned, flagged = drawn(seed, levels=levels)
    truth, found = poisoned.numpy(), flagged.numpy()
    tn, fp, fn, tp = oracle.confusion_matrix(truth, found).ravel().tolist()
    assert confusion(flagged, poisoned) == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    assert min(tp, fp, fn, tn) > 0
    wanted = {
        true_positive_rate: oracle.recall_score(truth, found),
        false_positive_rate: oracle.recall_score(~truth, found),
        precision: oracle.precision_score(truth, found),
        f1: oracle.f1_score(truth, found),
    }
    for ours, theirs in wanted.items():
        assert ours(flagged, poisoned) == pytest.approx(100 * theirs, rel=1e-12)
    theirs = oracle.roc_auc_score(truth, score.numpy())
    assert auroc(score, poisoned) == pytest.approx(100 * theirs, rel=1e-12)
    theirs = oracle.average_precision_score(truth, score.numpy())
    assert average_precision(score, poisoned) == pytest.approx(100 * theirs, rel=1e-12)


def test_equal_scores_say_nothing():
    poisoned = mask(1, 0, 0, 0)
    assert auroc(torch.ones(4), poisoned) == 50
    assert average_precision(torch.ones(4), poisoned) == 25


def test_only_the_order_of_the_scores_matters():
    score, poisoned, _ = drawn(9, levels=4)
    for changed in (score.exp(), score / 1e30, score.double() * 7 - 3):
        assert auroc(changed, poisoned) == auroc(score, poisoned)
        assert average_precision(changed, poisoned) == average_precision(score, poisoned)
    assert auroc(-score, poisoned) == pytest.approx(100 - auroc(score, poisoned))
    endless = torch.tensor([math.inf, 1.0, -math.inf, math.inf])
    assert auroc(endless, mask(1, 0, 0, 0)) == pytest.approx(250 / 3)


def test_counts_are_exact_beyond_the_range_of_32_bits():
    poisoned = torch.arange(400_000) >= 200_000
    score = torch.arange(400_000, dtype=torch.float64)
    assert auroc(score, poisoned) == 100
    score[0] = math.inf  # this one loses 200,000 of 4e10 pairs
    assert auroc(score, poisoned) == 100 - 100 / 200_000


@pytest.mark.parametrize("poisoned", [mask(1, 0, 1), mask(0, 0, 0)])
def test_nothing_flagged(poisoned):
    flagged = mask(0, 0, 0)
    assert precision(flagged, poisoned) == f1(flagged, poisoned) == 0
    assert false_positive_rate(flagged, poisoned) == 0
    if poisoned.any():
        assert true_positive_rate(flagged, poisoned) == 0


def test_nothing_poisoned_and_nothing_else():
    some, none, everything = mask(1, 0, 0), mask(0, 0, 0), mask(1, 1, 1)
    score = torch.tensor([1.0, 2.0, 3.0])
    assert math.isnan(true_positive_rate(some, none))
    assert math.isnan(auroc(score, none))
    assert math.isnan(average_precision(score, none))
    assert precision(some, none) == f1(some, none) == 0
    assert math.isnan(false_positive_rate(some, everything))
    assert math.isnan(auroc(score, everything))
    assert average_precision(score, everything) == 100


def test_scores_that_are_no_number_rank_nothing():
    score = torch.tensor([math.nan, 1.0, 2.0])
    assert math.isnan(auroc(score, mask(1, 0, 0)))
    assert math.isnan(average_precision(score, mask(1, 0, 0)))


def test_the_record_of_findings():
    score, poisoned, flagged = drawn(3, levels=4)
    covers = ~poisoned & (torch.arange(200) % 3 == 0)
    rounds = torch.stack([torch.ones(200, dtype=torch.bool), flagged])
    findings = make_findings(flagged, score, rounds, consistency=-score)
    record = identification(findings, make_data(poisoned, covers))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["n"] == 200
    assert record["n_flagged"] == int(flagged.sum())
    assert record["n_poisoned"] == int(poisoned.sum())
    assert record["n_covers"] == int(covers.sum())
    assert {key: record[key] for key in ("tp", "fp", "fn", "tn")} == confusion(flagged, poisoned)
    for key, value in {
        "tpr": true_positive_rate(flagged, poisoned),
        "fpr": false_positive_rate(flagged, poisoned),
        "precision": precision(flagged, poisoned),
        "f1": f1(flagged, poisoned),
        "auroc": auroc(score, poisoned),
        "ap": average_precision(score, poisoned),
    }.items():
        assert record[key] == round(value, 4)
    # covers are clean: they are among those of the FPR, and counted by themselves as well
    share = sum(f for f, c in zip(flagged.tolist(), covers.tolist(), strict=True) if c)
    assert 0 < share < covers.sum()
    assert record["cover_fpr"] == round(100 * share / int(covers.sum()), 4)
    assert record["further"] == {
        "consistency": {
            "auroc": round(auroc(-score, poisoned), 4),
            "ap": round(average_precision(-score, poisoned), 4),
        }
    }
    assert record["rounds"] == [
        {"n_flagged": 200, "tpr": 100, "fpr": 100},
        {"n_flagged": record["n_flagged"], "tpr": record["tpr"], "fpr": record["fpr"]},
    ]


def test_what_is_undefined_is_null_in_the_record():
    rounds = mask(1, 0, 0)[None]
    findings = make_findings(mask(1, 0, 0), rounds=rounds)
    record = identification(findings, make_data(mask(0, 0, 0), mask(0, 0, 0)))
    undefined = {key for key, value in record.items() if value is None}
    assert undefined == {"tpr", "auroc", "ap", "cover_fpr"}
    assert record["rounds"] == [{"n_flagged": 1, "tpr": None, "fpr": 33.3333}]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    record = identification(findings, make_data(mask(0, 1, 0)))
    assert record["n_covers"] is record["cover_fpr"] is None


def test_without_truth_only_counts_are_left():
    findings = make_findings(mask(1, 0, 1))
    few = {"n": 3, "n_flagged": 2, "rounds": []}
    assert identification(findings, None) == few
    unknown = TrainingSet(torch.zeros(3).long(), (), None, None)
    assert identification(findings, unknown) == few
    told = make_findings(mask(1, 1, 0), rounds=mask(1, 0, 0)[None])
    assert identification(told, unknown)["rounds"] == [{"n_flagged": 1}]


def test_where_nothing_was_judged_scores_are_left():
    findings = replace(make_findings(mask(1, 0, 1), rounds=mask(1, 0, 0)[None]), flagged=None)
    record = identification(findings, make_data(mask(0, 1, 0)))
    assert record.keys() == {"n", "n_poisoned", "n_covers", "auroc", "ap", "further", "rounds"}
    assert identification(findings, None).keys() == {"n", "rounds"}


def test_findings_of_other_samples_are_refused():
    with pytest.raises(DataError, match="about 3 samples and the training set has 2"):
        identification(make_findings(mask(1, 0, 1)), make_data(mask(1, 0)))
    with pytest.raises(DataError, match="has to judge every sample"):
        identification(make_findings(mask(1)), TrainingSet(torch.zeros(2).long(), (), None, None))
