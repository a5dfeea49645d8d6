"""Which flagged samples are likely to be poisoned, and which class an attack would be after.

A method that looks for the most suspicious samples flags some in any training set, often most of
them in one class. A clean network names many of those otherwise too, since they are hard. An attack
that changes labels leaves another trace: samples of *one* class are named otherwise, and they come
from *all* other classes, while hard samples go to a few neighbours. So a class stands out if

- far more of its samples are named otherwise than of the other classes. Each class is counted
  without the neighbours to which most of its samples go, and against all others together. Classes
  differ in clean sets too: their rates are taken as Dirichlet distributed, so that the count of one
  class among all is beta-binomial; and
- its samples are named as the other classes are large, nearly: exp(-KL) of the two distributions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.types import Findings

TIERS = ("", "possible", "likely")
"""Names of the tiers, by their number."""
POSSIBLE, LIKELY = 1, 2

LEVEL = 0.01
"""Chance of a false alarm that is allowed, over all classes of a set."""
NEIGHBOURS = 1 / 3
"""Share of the other classes that count as the neighbours of a class."""
SPREAD, WEIGHT = 0.5, 8.0
"""Squared variation of the rates of clean classes that is expected, and how many classes of a set
it weighs as much as."""
EVEN = 0.9
"""How evenly the names of an attacked class are spread at least; 1 is as the classes are large."""
FEWEST, FEWEST_CLASSES = 1000, 6
"""Samples and classes of a set below which no class is said to stand out. A tenth of fewer samples
is less than 100 poisoned ones: 60 planted no backdoor among 1,000 digits, and 100 with a larger
patch did. A hard class of five has four neighbours, and its samples often go to all of them."""


@dataclass(frozen=True)
class Standing:
    """How the classes of a training set compare.

    Attributes:
        sizes: Samples of each of the K classes.
        flagged: Of them, flagged.
        renamed: Of those, named otherwise by the clean network.
        kinds: To how many other classes those go.
        chance: Of so many renamed samples or more in a clean set, beyond the neighbours; corrected
            for the number of classes. 1 where nothing is compared. The evenness is not in it.
        evenness: Of the names of each class; see `spread_evenly`.
        attacked: The class that stands out; None where none does.
    """

    sizes: tuple[int, ...]
    flagged: tuple[int, ...]
    renamed: tuple[int, ...]
    kinds: tuple[int, ...]
    chance: tuple[float, ...]
    evenness: tuple[float, ...]
    attacked: int | None


def compare_classes(labels: Tensor, flagged: Tensor, proposed: Tensor) -> Standing:
    """Looks for one class that stands out against all others.

    Args:
        labels: (N,), int64, as the data shows them.
        flagged: (N,), bool.
        proposed: (N,), int64: what the clean network names flagged samples; -1 where it did not.
    """
    num_classes = 1 + int(torch.maximum(labels, proposed).max())
    sizes = labels.bincount(minlength=num_classes)
    found = labels[flagged].bincount(minlength=num_classes)
    moved = flagged & (proposed >= 0) & (proposed != labels)
    cells = labels[moved] * num_classes + proposed[moved]
    moves = cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    broad = moves.sort(1, descending=True).values[:, int(NEIGHBOURS * (num_classes - 1)) :].sum(1)
    chance = chances(broad, sizes)
    evenness = [spread_evenly(row, sizes, k) for k, row in enumerate(moves)]
    least = min(range(num_classes), key=chance.__getitem__)
    usable = len(labels) >= FEWEST and int((sizes > 0).sum()) >= FEWEST_CLASSES
    usable = usable and not fails(sizes, found)
    stands_out = usable and chance[least] < LEVEL and evenness[least] >= EVEN
    return Standing(
        sizes=tuple(sizes.tolist()),
        flagged=tuple(found.tolist()),
        renamed=tuple(moves.sum(1).tolist()),
        kinds=tuple((moves > 0).sum(1).tolist()),
        chance=tuple(chance),
        evenness=tuple(evenness),
        attacked=least if stands_out else None,
    )


def tiers_of(findings: Findings, labels: Tensor) -> Tensor:
    """The tier of each sample, (N,), int64: 0 where it is not flagged.

    Likely are the flagged samples of the class that stands out which the clean network names
    otherwise; possible are all others that are flagged.

    Args:
        findings: Of a method.
        labels: (N,), as the data shows them.
    """
    tiers = torch.zeros(len(labels), dtype=torch.long)
    if findings.flagged is None or not findings.flagged.any():
        return tiers
    labels, flagged, named = labels.long(), findings.flagged.bool(), findings.proposed
    tiers[flagged] = POSSIBLE
    attacked = compare_classes(labels, flagged, named).attacked
    if attacked is not None:
        tiers[flagged & (labels == attacked) & (named >= 0) & (named != attacked)] = LIKELY
    return tiers


def fails(sizes: Tensor, found: Tensor) -> bool:
    """Whether more is flagged than any attack poisons: half of all, or of several classes.

    Args:
        sizes: Samples of each class, (K,).
        found: Flagged ones, (K,).
    """
    return bool(2 * found.sum() > sizes.sum()) or int((2 * found > sizes).sum()) > 1


def spread_evenly(row: Tensor, sizes: Tensor, label: int) -> float:
    """How much the names that samples of a class got are spread as all other samples are.

    exp(-KL(names || sizes)), which is the effective share of the other classes that are named. A
    few samples are never spread quite evenly; that is allowed for (Miller and Madow).

    Args:
        row: How many got the name of each class, (K,); 0 of their own.
        sizes: (K,).
        label: Theirs.

    Returns:
        In [0, 1]; 0 where nothing is named.
    """
    others, total = sizes.double().clone(), int(row.sum())
    others[label] = 0
    named = row > 0
    if not total or (others[named] == 0).any():
        return 0.0
    names, sizes = row[named] / total, others[named] / others.sum()
    divergence = float((names * (names / sizes).log()).sum())
    return min(1.0, math.exp((len(names) - 1) / (2 * total) - divergence))


def chances(counts: Tensor, sizes: Tensor) -> list[float]:
    """The chance of each class to count so much or more, if all are drawn alike; times K.

    The rates of the classes are Dirichlet distributed around a common one. How much they vary is
    what the other classes of the set show, together with `SPREAD`, which counts as `WEIGHT`
    classes. So a set of two or three classes can be judged as well.

    Args:
        counts: (K,).
        sizes: (K,); a class without samples has the chance 1.
    """
    present = sizes > 0
    total, kinds = int(counts.sum()), int(present.sum())
    result = [1.0] * len(sizes)
    for k in present.nonzero().flatten().tolist() if kinds > 1 and total else ():
        others = present.clone()
        others[k] = False
        strength = kinds / _spread(counts[others].double(), sizes[others].double())
        share = float(sizes[k]) / float(sizes.sum())
        tail = _beta_binomial_tail(int(counts[k]), total, strength * share, strength * (1 - share))
        result[k] = min(1.0, kinds * tail)
    return result


def _spread(counts: Tensor, sizes: Tensor) -> float:
    """Squared variation of the rates behind counts, beyond that of counting, and of `SPREAD`."""
    expected = counts.sum() / sizes.sum() * sizes
    free = len(counts) - 1
    if not free or not counts.any():
        return SPREAD
    seen = float((((counts - expected) ** 2 - expected) / expected**2).sum()) / free
    return (WEIGHT * SPREAD + free * max(seen, 0.0)) / (WEIGHT + free)


def _beta_binomial_tail(least: int, total: int, a: float, b: float) -> float:
    """P(X >= least) of the beta-binomial distribution of `total` draws."""
    hits = torch.arange(least, total + 1, dtype=torch.float64)
    misses = total - hits
    log_p = (
        math.lgamma(total + 1)
        - torch.lgamma(hits + 1)
        - torch.lgamma(misses + 1)
        + torch.lgamma(hits + a)
        + torch.lgamma(misses + b)
        - math.lgamma(total + a + b)
        + (math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    )
    return float(log_p.exp().sum())
