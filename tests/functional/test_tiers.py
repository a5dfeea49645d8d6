"""One class against the others: attacked ones are named, hard ones are not."""

import math

import pytest
import torch
from scipy.stats import betabinom

from bdclean.functional import tiers
from bdclean.functional.tiers import LIKELY, POSSIBLE, chances, compare_classes, tiers_of
from bdclean.types import Findings

SIZE = 400


def samples(moves, size=SIZE, kept=20):
    """Labels, flags and names of classes: `moves[i][j]` of class i are flagged and named j."""
    labels, flagged, named = [], [], []
    for label, row in enumerate(moves):
        row = [*row]
        row[label] = kept
        rest = size - sum(row)
        labels += [label] * size
        flagged += [True] * sum(row) + [False] * rest
        named += [name for name, count in enumerate(row) for _ in range(count)] + [-1] * rest
    return torch.tensor(labels), torch.tensor(flagged), torch.tensor(named)


def hard(kinds=10, most=30):
    """A clean set: a few samples of each go to each, and many to two neighbours."""
    few = 2 if kinds <= 10 else 0
    moves = [[few + (i + j) % 3 for j in range(kinds)] for i in range(kinds)]
    for i in range(0, kinds - 1, 2):
        moves[i][i + 1] = moves[i + 1][i] = most
    return moves


def found(flagged, named):
    none = torch.zeros(0, len(flagged))
    return Findings(torch.zeros(len(flagged)), flagged, named, {}, none.bool(), none)


def attacked(moves, **words):
    return compare_classes(*samples(moves, **words)).attacked


def test_the_tail_is_that_of_scipy():
    for least, total, a, b in (0, 5, 1.0, 3.0), (3, 50, 2.0, 18.0), (40, 200, 0.5, 4.0):
        expected = betabinom.sf(least - 1, total, a, b)
        assert tiers._beta_binomial_tail(least, total, a, b) == pytest.approx(expected)


def test_hard_classes_do_not_stand_out():
    assert attacked(hard()) is None
    deer = hard()
    deer[4][5], deer[4][3], deer[4][7] = 120, 60, 40  # three neighbours take nearly all
    assert attacked(deer) is None


def planted(kinds=10):
    moves = hard(kinds)
    moves[1] = [4 + 180 // kinds] * kinds
    return moves


@pytest.mark.parametrize("kinds", [4, 5, 6, 10, 43])
def test_a_class_of_which_many_go_everywhere_stands_out(kinds):
    standing = compare_classes(*samples(planted(kinds)))
    assert standing.attacked == (1 if kinds >= tiers.FEWEST_CLASSES else None)
    assert standing.chance[1] < tiers.LEVEL
    assert standing.kinds[1] == kinds - 1
    assert standing.evenness[1] == pytest.approx(1)


def test_a_class_that_has_most_flags_and_goes_to_neighbours_does_not():
    """As in a clean set: nearly nothing of the other classes is flagged."""
    moves = [[0] * 10 for _ in range(10)]
    moves[1] = [8, 0, 1, 1, 0, 1, 1, 1, 28, 14]
    moves[9] = [5, 0, 0, 0, 0, 0, 0, 0, 7, 0]
    standing = compare_classes(*samples(moves))
    assert standing.attacked is None
    assert standing.evenness[1] < 0.6
    moves[1] = [16, 0, 8, 8, 6, 5, 3, 2, 2, 2]  # many of some, and some of all
    assert compare_classes(*samples(moves)).chance[1] < tiers.LEVEL
    assert attacked(moves) is None


def test_names_are_compared_with_the_sizes_of_the_classes():
    sizes = torch.tensor([900, 300, 300, 600])
    even = tiers.spread_evenly
    assert even(torch.tensor([0, 100, 100, 200]), sizes, 0) == pytest.approx(1)
    assert even(torch.tensor([0, 300, 0, 0]), sizes, 0) == pytest.approx(1 / 4)
    half = even(torch.tensor([0, 1000, 1000, 0]), sizes, 0)
    assert half == pytest.approx(0.5 * math.exp(1 / 4000))
    assert even(torch.tensor([0, 1, 1, 1]), sizes, 0) == 1  # no more can be said of three
    assert even(torch.zeros(4).long(), sizes, 0) == 0
    assert even(torch.tensor([0, 3, 3, 3]), torch.tensor([9, 9, 9, 0]), 0) == 0


def test_classes_that_are_all_attacked_do_not_stand_out():
    moves = hard()
    for i in range(10):
        moves[i][i - 1] += 40  # all to all
    assert attacked(moves) is None


def test_what_is_flagged_beyond_measure_names_no_class():
    moves = planted()
    assert attacked(moves) == 1
    assert attacked(moves, kept=180) is None  # more than half of every class
    assert attacked(moves, size=1000, kept=20) == 1
    labels, flagged, named = samples(moves)
    few = (torch.arange(len(labels)) % 5 == 0).nonzero().flatten()[: tiers.FEWEST - 1]
    assert compare_classes(labels[few], flagged[few], named[few]).attacked is None


def test_sizes_count_and_empty_classes_do_not():
    counts, sizes = torch.tensor([40, 10, 10, 10, 0]), torch.tensor([400, 100, 100, 100, 0])
    assert chances(counts, sizes) == [1.0] * 5  # the same rates
    assert chances(counts, torch.tensor([100, 100, 100, 100, 0]))[0] < 1
    assert chances(torch.zeros(3).long(), torch.tensor([5, 5, 5])) == [1.0] * 3
    assert chances(torch.tensor([5]), torch.tensor([9])) == [1.0]


def test_two_classes_are_judged_by_what_is_expected():
    unsure, sure = (chances(torch.tensor([k, 10]), torch.tensor([500, 500]))[0] for k in (30, 400))
    assert unsure > tiers.LEVEL > sure


def test_the_tiers_of_samples():
    labels, flagged, named = samples(planted())
    told = tiers_of(found(flagged, named), labels)
    likely = flagged & (labels == 1) & (named != 1)
    assert (told == LIKELY).equal(likely)
    assert (told == POSSIBLE).equal(flagged & ~likely)
    labels, flagged, named = samples(hard())
    assert tiers_of(found(flagged, named), labels).equal(flagged.long())
    # flagged and nothing proposed, nothing flagged, nothing judged
    assert tiers_of(found(flagged, torch.full_like(named, -1)), labels).equal(flagged.long())
    assert not tiers_of(found(torch.zeros_like(flagged), named), labels).any()
    scored = found(flagged, named)
    scored = Findings(scored.score, None, named, {}, scored.rounds, scored.round_epochs)
    assert not tiers_of(scored, labels).any()
    assert math.isfinite(tiers.SPREAD)
