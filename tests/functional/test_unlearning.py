"""What is climbed, sample by sample."""

import math

import pytest
import torch

from bdclean.functional.unlearning import capped_cross_entropy, descent_and_ascent

LOGITS = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 2.0], [9.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 1])
EACH = [
    -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
]


@pytest.mark.parametrize("cap", [None, 1.2])
def test_the_mean_is_that_of_the_samples(cap):
    limit = math.inf if cap is None else cap
    assert EACH[2] > 1.2 > EACH[3]
    climbed = sum(min(loss, limit) for loss in EACH) / 4
    assert capped_cross_entropy(LOGITS, LABELS, cap).item() == pytest.approx(climbed, abs=1e-6)


def test_beyond_the_cap_nothing_pulls():
    logits = LOGITS.clone().requires_grad_()
    capped_cross_entropy(logits, LABELS, 1.2).backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [loss < 1.2 for loss in EACH]
    assert (logits.grad[3] * torch.tensor([1, -1, 1]) > 0).all()  # ascent lowers the label


def test_half_precision_is_not_used():
    assert capped_cross_entropy(LOGITS.bfloat16(), LABELS, None).dtype == torch.float32


@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("forget", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_descent_and_ascent_add_up_sample_by_sample(cap, forget):
    limit = math.inf if cap is None else cap
    kept = sum(loss for loss, away in zip(EACH, forget, strict=True) if not away)
    climbed = sum(min(loss, limit) for loss, away in zip(EACH, forget, strict=True) if away)
    loss = descent_and_ascent(LOGITS.bfloat16(), LABELS, torch.tensor(forget) == 1, 0.25, cap)
    assert loss.item() == pytest.approx((0.25 * kept - climbed) / 2, abs=1e-6)
    assert loss.dtype == torch.float32
