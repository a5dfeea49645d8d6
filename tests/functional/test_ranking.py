import pytest
import torch

from bdclean.errors import ConfigError
from bdclean.functional.ranking import fewest_rounds, highest, highest_of_each, lowest, share_of


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [
        (50000, 0.01, 500),
        (1000, 0.05, 50),
        (199, 0.01, 1),
        (99, 0.01, 0),
        (100, 0.29, 29),
        (7, 1, 7),
    ],
)
def test_the_share_is_rounded_down_as_decimals_are(size, fraction, count):
    assert share_of(size, fraction) == count


def test_ends_of_the_ranking_against_sorting():
    scores = torch.randn(103, generator=torch.Generator().manual_seed(0))
    order = sorted(range(103), key=lambda i: scores[i].item())
    assert lowest(scores, 0.2).nonzero().flatten().tolist() == sorted(order[:20])
    assert highest(scores, 0.05).nonzero().flatten().tolist() == sorted(order[-5:])
    assert not lowest(scores, 0).any()
    assert not highest(scores, 0).any()
    assert lowest(scores, 1).all()


def test_the_rank_counts_and_not_the_value():
    scores = torch.randn(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lowest(scores, 0.1), lowest(scores.exp() * 100, 0.1))
    # a threshold on the value would take all of these, or none
    equal = torch.zeros(10)
    assert lowest(equal, 0.3).nonzero().flatten().tolist() == [0, 1, 2]
    assert highest(equal, 0.3).nonzero().flatten().tolist() == [7, 8, 9]
    assert not (lowest(equal, 0.5) & highest(equal, 0.5)).any()


def test_more_of_each_label_up_to_its_share():
    scores = torch.tensor([5.0, 1.0, 4.0, 3.0, 9.0, 8.0, 7.0, 9.0, 0.0])
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 5])
    none = torch.zeros(9, dtype=torch.bool)
    first = highest_of_each(scores, labels, none, 0.25)
    assert first.nonzero().flatten().tolist() == [0, 4, 8]  # of equal ones the first; one of each
    lowered = scores.masked_fill(first, -1.0)  # what is taken stays, whatever its score is now
    second = highest_of_each(lowered, labels, first, 0.5)
    assert second.nonzero().flatten().tolist() == [0, 2, 4, 7, 8]
    assert torch.equal(highest_of_each(scores, labels, second, 0.3), second)
    assert highest_of_each(scores, labels, none, 1.0).all()
    assert none.sum() == 0


def test_what_the_fewest_rounds_mark_comes_first_and_then_the_highest():
    #                     often: 0     1     1     3     3     3     2     3
    rounds = torch.tensor(
        [
            [0, 1, 0, 1, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 1, 1, 1, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ]
    ).bool()
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    scores = torch.tensor([-900.0, 5, 9, 700, 1, 7, -8, 2])

    def rows(below, share):
        marked = fewest_rounds(rounds, scores, labels, below, share)
        return marked.nonzero().flatten().tolist()

    assert rows(0.5, 0.25) == [0, 1, 2, 6]  # more than the share of the label 0: it stays
    assert rows(0.5, 0.5) == [0, 1, 2, 5, 6]
    assert rows(0.5, 0.75) == [0, 1, 2, 5, 6, 7]
    assert rows(0.0, 0.5) == [0, 2, 5, 6]
    assert rows(0.0, 0.0) == [0, 6]  # one of each label at least


def test_a_large_label_brings_no_more_than_the_middle_one():
    labels = torch.tensor([0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3])
    rounds = torch.ones(2, len(labels), dtype=torch.bool)
    marked = fewest_rounds(rounds, -labels.new_tensor(range(16)).float(), labels, 0.5, 0.5)
    assert marked.nonzero().flatten().tolist() == [0, 2, 3, 6, 7]  # of 2, 4 and 10; no label is 1


def test_refuses_scores_that_are_not_numbers():
    with pytest.raises(ConfigError, match="diverged"):
        lowest(torch.tensor([0.0, float("nan")]), 0.5)
