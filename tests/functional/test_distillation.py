import math

import pytest
import torch

from bdclean.errors import ConfigError
from bdclean.functional import hard_label_loss, rising_temperature, tempered_kl


def logits(n=7, k=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, k, generator=generator).unbind()


def softmax(row, temperature=1.0):
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def test_temperature_rises_to_the_final_one():
    assert [rising_temperature(e, 100) for e in (0, 49, 99)] == pytest.approx([1.03, 2.5, 4.0])
    assert rising_temperature(3, 4, final=2.0) == 2.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((-1, 10), "epoch is -1"), ((10, 10), "epoch is 10"), ((0, 1, 0.0), "final temperature is 0")],
)
def test_temperature_arguments_out_of_range(arguments, text):
    with pytest.raises(ConfigError, match=text):
        rising_temperature(*arguments)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.03, 0.873343), (2.5, 0.176019), (4.0, 0.068001)]
)
def test_golden_divergences(temperature, expected):
    teacher, student = torch.tensor([[2.0, 0, -1]]), torch.tensor([[0.0, 1, 0]])
    assert tempered_kl(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_a_loop(temperature):
    student, teacher = logits()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        total += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    found = tempered_kl(student, teacher, temperature).item()
    assert found == pytest.approx(total / len(student), abs=1e-5)


def test_divergence_is_zero_for_equal_logits_and_blind_to_constants():
    student, teacher = logits()
    shift = torch.linspace(-3, 3, 7)[:, None]
    assert tempered_kl(student, student + shift, 2.0).abs().item() < 1e-6
    torch.testing.assert_close(
        tempered_kl(student + shift, teacher - shift, 2.0), tempered_kl(student, teacher, 2.0)
    )


def test_gradients_flow_where_the_caller_lets_them():
    student, teacher = (x.requires_grad_() for x in logits())
    tempered_kl(student, teacher.detach(), 1.5).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 1e-3
    tempered_kl(student.detach(), teacher, 1.5).backward()
    assert teacher.grad.abs().max() > 1e-3


def test_losses_are_float32_for_low_precision_logits():
    student, teacher = (x.bfloat16() for x in logits())
    with torch.autocast("cpu", torch.bfloat16):
        found = tempered_kl(student, teacher, 3.0), hard_label_loss(student, teacher)
    student, teacher = student.float(), teacher.float()
    expected = tempered_kl(student, teacher, 3.0), hard_label_loss(student, teacher)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_divergence_needs_a_positive_temperature(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        tempered_kl(*logits(), temperature)


def test_hard_labels_equal_a_loop():
    student, teacher = logits()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total -= math.log(softmax(s)[t.index(max(t))])
    assert hard_label_loss(student, teacher).item() == pytest.approx(total / 7, abs=1e-5)
