"""How well a defence finds the poisoned samples of a training set.

Positive is a sample that is truly poisoned. Cover samples, which carry the trigger and keep their
label, count as clean; the flagged share of them is reported apart. All rates are percentages.
A rate whose denominator is empty is NaN, except that precision and F1 are 0 where nothing is
flagged. In JSON, NaN becomes null.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bdclean.errors import DataError
from bdclean.types import Findings, TrainingSet


def confusion(flagged: Tensor, poisoned: Tensor) -> dict[str, int]:
    """Counts true and false positives and negatives.

    Args:
        flagged: (N,), bool.
        poisoned: (N,), bool: the truth.

    Returns:
        `tp`, `fp`, `fn` and `tn`.
    """
    tp = int((flagged & poisoned).sum())
    fp, fn = int(flagged.sum()) - tp, int(poisoned.sum()) - tp
    return {"tp": tp, "fp": fp, "fn": fn, "tn": len(flagged) - tp - fp - fn}


def true_positive_rate(flagged: Tensor, poisoned: Tensor) -> float:
    """TP / (TP + FN): the flagged share of the poisoned samples; NaN where there are none.

    Args:
        flagged: (N,), bool.
        poisoned: (N,), bool: the truth.
    """
    return _percent(int(flagged[poisoned].sum()), int(poisoned.sum()))


def false_positive_rate(flagged: Tensor, poisoned: Tensor) -> float:
    """FP / (FP + TN): the flagged share of all other samples; NaN where there are none.

    Args:
        flagged: (N,), bool.
        poisoned: (N,), bool: the truth.
    """
    return true_positive_rate(flagged, ~poisoned)


def precision(flagged: Tensor, poisoned: Tensor) -> float:
    """TP / (TP + FP): the poisoned share of the flagged samples; 0 where there are none.

    Args:
        flagged: (N,), bool.
        poisoned: (N,), bool: the truth.
    """
    return true_positive_rate(poisoned, flagged) if flagged.any() else 0.0


def f1(flagged: Tensor, poisoned: Tensor) -> float:
    """2 TP / (2 TP + FP + FN); 0 where nothing is flagged.

    Args:
        flagged: (N,), bool.
        poisoned: (N,), bool: the truth.
    """
    hits = int((flagged & poisoned).sum())
    return _percent(2 * hits, int(flagged.sum()) + int(poisoned.sum())) if hits else 0.0


def auroc(score: Tensor, poisoned: Tensor) -> float:
    """Area under the ROC curve: how often a poisoned sample scores above another one.

    The Mann-Whitney statistic over all pairs; a tie counts half. NaN where there are no pairs, or
    where a score is NaN.

    Args:
        score: (N,); higher is more suspicious.
        poisoned: (N,), bool: the truth.
    """
    positive, negative = _counts_by_score(score, poisoned)
    below = negative.cumsum(0) - negative
    doubled = int((positive * (2 * below + negative)).sum())  # integers: exact
    return _percent(doubled, 2 * int(positive.sum()) * int(negative.sum()))


def average_precision(score: Tensor, poisoned: Tensor) -> float:
    """AP: sum over the distinct scores, from the highest, of (R_k - R_(k-1)) P_k.

    R and P are recall and precision if all samples down to the k-th score are flagged. NaN where
    nothing is poisoned, or where a score is NaN.

    Args:
        score: (N,); higher is more suspicious.
        poisoned: (N,), bool: the truth.
    """
    positive, negative = (counts.flip(0) for counts in _counts_by_score(score, poisoned))
    found = positive.cumsum(0)
    at = found.double() / (found + negative.cumsum(0))
    return _percent(float((positive * at).sum()), int(positive.sum()))


def identification(findings: Findings, data: TrainingSet | None) -> dict[str, Any]:
    """What a run record says of the findings.

    Args:
        findings: Of a defence, for N samples.
        data: The same samples; None where nothing is known of them.

    Returns:
        JSON-ready: the counts `n` and `n_flagged`, the list `rounds` (`n_flagged` before and
        after each round) and, where the truth is known, `n_poisoned`, `n_covers`, `tp`, `fp`,
        `fn`, `tn`, the percentages `tpr`, `fpr`, `precision`, `f1`, `auroc`, `ap` and
        `cover_fpr`, `further` (`auroc` and `ap` of each further score), and `tpr` and `fpr` in
        each of `rounds`. What comes from flags is left out where there are none.

    Raises:
        DataError: If findings and data are of different length.
    """
    flagged = None if findings.flagged is None else findings.flagged.cpu()
    size = len(findings.score)
    rounds = [{"n_flagged": int(mask.sum())} for mask in findings.rounds]
    facts: dict[str, Any] = {"n": size, "rounds": rounds}
    if flagged is not None:
        facts["n_flagged"] = int(flagged.sum())
    if data is not None and len(data.labels) != size:
        raise DataError(
            f"The findings are about {size} samples and the training set has "
            f"{len(data.labels)}; a defence has to judge every sample of it."
        )
    if data is None or data.poisoned is None:
        return facts
    truth = data.poisoned.cpu()
    covers = None if data.covers is None else data.covers.cpu()
    return {
        **facts,
        "n_poisoned": int(truth.sum()),
        "n_covers": None if covers is None else int(covers.sum()),
        **({} if flagged is None else _judgement(flagged, truth, covers)),
        **_ranking(findings.score, truth),
        "further": {name: _ranking(score, truth) for name, score in findings.further.items()},
        "rounds": [
            count
            | {
                "tpr": _json(true_positive_rate(mask, truth)),
                "fpr": _json(false_positive_rate(mask, truth)),
            }
            for count, mask in zip(rounds, findings.rounds.cpu(), strict=True)
        ],
    }


def _judgement(flagged: Tensor, truth: Tensor, covers: Tensor | None) -> dict[str, Any]:
    return {
        **confusion(flagged, truth),
        "tpr": _json(true_positive_rate(flagged, truth)),
        "fpr": _json(false_positive_rate(flagged, truth)),
        "precision": _json(precision(flagged, truth)),
        "f1": _json(f1(flagged, truth)),
        "cover_fpr": None if covers is None else _json(true_positive_rate(flagged, covers)),
    }


def _ranking(score: Tensor, truth: Tensor) -> dict[str, float | None]:
    score = score.cpu()
    return {"auroc": _json(auroc(score, truth)), "ap": _json(average_precision(score, truth))}


def _counts_by_score(score: Tensor, poisoned: Tensor) -> tuple[Tensor, Tensor]:
    """Poisoned and other samples at each distinct score, lowest first; none if one is NaN."""
    if score.isnan().any():
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing
    values, place = torch.unique(score, return_inverse=True)
    positive = place[poisoned].bincount(minlength=len(values))
    return positive, place[~poisoned].bincount(minlength=len(values))


def _percent(part: float, whole: int) -> float:
    return 100 * part / whole if whole else math.nan


def _json(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
