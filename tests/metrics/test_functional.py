import pytest
import torch
from scipy.stats import binomtest

from bdclean.errors import DataError
from bdclean.metrics.functional import hit_count, percentage, predicted_classes, wilson_interval


def test_logits_and_class_indices_are_told_apart():
    logits = torch.tensor([[0.1, 0.9, 0.0], [5.0, 1.0, 2.0]])
    assert predicted_classes(logits).tolist() == [1, 0]
    assert predicted_classes(torch.tensor([2, 1], dtype=torch.int32)).tolist() == [2, 1]


@pytest.mark.parametrize(
    "outputs",
    [torch.rand(4), torch.rand(2, 3, 4), torch.zeros(4, 2, dtype=torch.long), torch.ones(3).bool()],
)
def test_other_outputs_are_refused(outputs):
    with pytest.raises(DataError, match="cannot be scored"):
        predicted_classes(outputs)


def test_hit_count_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    wanted = torch.randint(7, (50,), generator=generator)
    expected = sum(
        max(range(7), key=lambda k: row[k]) == label
        for row, label in zip(logits.tolist(), wanted.tolist(), strict=True)
    )
    assert 0 < expected < 50
    assert hit_count(logits, wanted).item() == expected


@pytest.mark.parametrize("wanted", [torch.zeros(3).long(), torch.zeros(4, 1).long()])
def test_hit_count_refuses_labels_of_another_shape(wanted):
    with pytest.raises(DataError, match="4 predictions meet labels"):
        hit_count(torch.zeros(4, 2), wanted)


def test_percentage():
    assert percentage(torch.tensor(1), torch.tensor(8)).item() == 12.5
    assert percentage(torch.tensor(0), torch.tensor(0)).isnan()


@pytest.mark.parametrize(
    ("hits", "total"), [(0, 1), (1, 1), (0, 9000), (3, 40), (361, 361), (5, 9)]
)
def test_the_interval_is_that_of_wilson(hits, total):
    known = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    ends = wilson_interval(hits, total)
    assert ends == pytest.approx((100 * known.low, 100 * known.high), abs=1e-4)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (2, 1), (-1, 4)])
def test_no_interval_of_nothing(hits, total):
    with pytest.raises(DataError, match="no interval"):
        wilson_interval(hits, total)
