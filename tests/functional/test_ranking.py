import pytest
import torch

from bdclean.errors import ConfigError
from bdclean.functional.ranking import highest, lowest, share_of


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


def test_refuses_scores_that_are_not_numbers():
    with pytest.raises(ConfigError, match="diverged"):
        lowest(torch.tensor([0.0, float("nan")]), 0.5)
