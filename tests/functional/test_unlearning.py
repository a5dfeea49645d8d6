"""What is climbed and what is descended, sample by sample."""

import math

import pytest
import torch

from bdclean.functional.unlearning import capped_cross_entropy, opposed_cross_entropy

LOGITS = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 2.0], [9.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 1])
EACH = [
    -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
]


@pytest.mark.parametrize("cap", [None, 1.2])
def test_means_are_those_of_the_samples(cap):
    limit = math.inf if cap is None else cap
    assert EACH[2] > 1.2 > EACH[3]
    forget = torch.tensor([True, False, True, True])
    climbed = sum(min(loss, limit) for loss in EACH) / 4
    assert capped_cross_entropy(LOGITS, LABELS, cap).item() == pytest.approx(climbed, abs=1e-6)
    opposed = (-EACH[0] + EACH[1] - min(EACH[2], limit) - EACH[3]) / 4
    value = opposed_cross_entropy(LOGITS, LABELS, forget, cap)
    assert value.item() == pytest.approx(opposed, abs=1e-6)


def test_beyond_the_cap_nothing_pulls_but_what_is_kept_always_does():
    logits = LOGITS.clone().requires_grad_()
    forget = torch.tensor([True, False, True, False])
    opposed_cross_entropy(logits, LABELS, forget, 1e-4).backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [False, True, False, True]
    assert (logits.grad[1] * torch.tensor([1, -1, 1]) > 0).all()  # descent raises the label


def test_half_precision_is_not_used():
    value = opposed_cross_entropy(LOGITS.bfloat16(), LABELS, LABELS > 5, None)
    assert value.dtype == torch.float32
