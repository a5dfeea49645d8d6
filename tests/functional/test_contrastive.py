import math

import pytest
import torch
from lightly.loss import NTXentLoss

from bdclean.errors import ConfigError, DataError
from bdclean.functional import nt_xent


def features(n=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def literal(a, b, temperature, symmetric=True):
    """CBD eq. 7, transcribed with plain loops in double precision."""
    z = [[x / math.hypot(*row) for x in row] for row in [*a.tolist(), *b.tolist()]]
    n = len(a)
    anchors = range(2 * n if symmetric else n)
    total = 0.0
    for i in anchors:
        s = [sum(x * y for x, y in zip(z[i], row, strict=True)) / temperature for row in z]
        partner = i + n if i < n else i - n
        denominator = sum(math.exp(s[k]) for k in range(2 * n) if k != i)
        total += -s[partner] + math.log(denominator)
    return total / len(anchors)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_literal_formula(temperature, symmetric):
    a, b = features()
    expected = literal(a, b, temperature, symmetric)
    found = nt_xent(a, b, temperature, symmetric=symmetric)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_the_two_readings_differ():
    a, b = features()
    assert abs(literal(a, b, 0.5) - literal(a, b, 0.5, symmetric=False)) > 1e-3


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_equals_lightly_in_value_and_gradient(temperature):
    a, b = (x.requires_grad_() for x in features(n=16, d=8))
    ours, theirs = nt_xent(a, b, temperature), NTXentLoss(temperature)(a, b)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(loss, (a, b)) for loss in (ours, theirs)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n", "expected"), [(2, 0.239545), (8, 1.062879), (128, 3.566010)])
def test_equal_views_with_orthonormal_rows(n, expected):
    assert nt_xent(torch.eye(n), torch.eye(n)).item() == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(math.log(math.e**2 + 2 * n - 2) - 2, abs=1e-6)


@pytest.mark.parametrize(("n", "expected"), [(2, 1.098612), (128, 5.541264)])
def test_all_rows_equal_or_all_orthogonal(n, expected):
    ones, eye = torch.ones(n, 3), torch.eye(2 * n)
    assert nt_xent(ones, ones).item() == pytest.approx(expected, abs=1e-5)
    assert nt_xent(eye[:n], eye[n:]).item() == pytest.approx(expected, abs=1e-5)


def test_further_closed_forms():
    eye = torch.eye(2)
    assert nt_xent(eye, -eye).item() == pytest.approx(2.758624, abs=1e-5)
    assert nt_xent(eye, eye, 1.0).item() == pytest.approx(0.551445, abs=1e-5)


def test_symmetries():
    a, b = features()
    loss = nt_xent(a, b)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scale = torch.linspace(0.1, 7, 6)[:, None]
    torch.testing.assert_close(nt_xent(a[order], b[order]), loss)
    torch.testing.assert_close(nt_xent(b, a), loss)
    torch.testing.assert_close(nt_xent(a * scale, b * scale.flip(0)), loss)
    assert abs(nt_xent(a, b[order]) - loss) > 1e-3


def test_gradient_is_orthogonal_to_the_features():
    a, b = features()
    b.requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(a, b), b)
    assert gradient.abs().max() > 1e-3
    assert (gradient * b).sum().abs() < 1e-6


def test_a_detached_argument_gets_no_gradient_and_the_other_does():
    a, b = (x.requires_grad_() for x in features())
    nt_xent(a.detach(), b).backward()
    assert a.grad is None
    assert b.grad.abs().max() > 1e-3


def test_float32_under_autocast_and_for_low_precision_features():
    a, b = (x.bfloat16() for x in features(n=32, d=64))
    expected = nt_xent(a.float(), b.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_low_temperature_stays_finite():
    a, _ = features()
    assert nt_xent(a, -a, 1e-3).isfinite()


@pytest.mark.parametrize("temperature", [0.0, -0.5])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        nt_xent(*features(), temperature)


@pytest.mark.parametrize("shape", [(5, 5), (6, 4), (6,), (6, 5, 1)])
def test_features_must_fit(shape):
    with pytest.raises(DataError, match="cannot be paired"):
        nt_xent(features()[0], torch.ones(shape))
