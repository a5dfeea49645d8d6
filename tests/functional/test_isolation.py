import math

import pytest
import torch

from bdclean.functional.isolation import flooding, local_gradient_ascent
from bdclean.functional.unlearning import capped_cross_entropy


def test_local_gradient_ascent_is_the_loss_with_its_sign_turned_below_the_level():
    losses = torch.tensor([0.0, 0.2, 0.5, 0.7, 3.0])
    for loss, got in zip(losses, local_gradient_ascent(losses, 0.5), strict=True):
        sign = (loss > 0.5).int() - (loss < 0.5).int()
        assert got == sign * loss
    assert local_gradient_ascent(losses, 0.5).tolist() == pytest.approx([0, -0.2, 0, 0.7, 3.0])
    assert torch.equal(local_gradient_ascent(losses, 0.0), losses)


def test_flooding_mirrors_the_loss_at_the_level():
    losses = torch.tensor([0.0, 0.2, 0.5, 0.7, 3.0])
    assert flooding(losses, 0.5).tolist() == pytest.approx([1.0, 0.8, 0.5, 0.7, 3.0])


@pytest.mark.parametrize("function", [local_gradient_ascent, flooding])
def test_gradient_changes_its_sign_at_the_level(function):
    for value, slope in ((0.49, -1.0), (0.51, 1.0)):
        loss = torch.tensor(value, requires_grad=True)
        function(loss, 0.5).backward()
        assert loss.grad.item() == slope


def test_capped_cross_entropy_is_the_mean_of_the_smaller_of_loss_and_cap():
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 1])
    losses = [-logits[i].detach().softmax(0)[label].log().item() for i, label in enumerate(labels)]
    assert losses[1] > 2 * math.log(2) > losses[0]
    expected = (losses[0] + 2 * math.log(2) + losses[2]) / 3
    loss = capped_cross_entropy(logits, labels, 2 * math.log(2))
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logits.grad[1].tolist() == [0, 0]  # far enough
    assert logits.grad[0].abs().min() > 0
    assert capped_cross_entropy(logits, labels, None).item() == pytest.approx(sum(losses) / 3)
