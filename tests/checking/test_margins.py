import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linprog

from bdclean.backbones import ModelInfo, build
from bdclean.checking import MarginTest, maximum_margins
from bdclean.checking.margins import judge
from bdclean.errors import ConfigError

SHORT = MarginTest(starts=4, steps=20)
SHORTEST = MarginTest(starts=2, steps=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    info = ModelInfo("resnet18", 8, 8, (0.5,) * 3, (0.25,) * 3, width=4)
    return build(info).eval()


def test_the_class_with_a_large_margin_is_found(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.head.weight[5] *= 40
    found = maximum_margins(model, SHORT)
    assert len(found.largest) == 8
    assert found.target == 5
    assert found.z > 5
    assert found.p < 0.05
    with torch.no_grad():
        model.head.weight[5] /= 40
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert not model.training
    first, again, other = (maximum_margins(model, SHORTEST, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.largest != other.largest


def test_the_ascent_raises_margins(model):
    short, longer = (maximum_margins(model, MarginTest(4, steps)).largest for steps in (1, 30))
    assert all(a < b for a, b in zip(short, longer, strict=True))


def test_the_margin_of_a_linear_network_is_known(model, monkeypatch):
    """It is the optimum of a linear program."""
    weight = torch.randn(8, 3 * 64, generator=torch.Generator().manual_seed(1))

    class Linear:
        def __init__(self, *_):
            pass

        def features(self, x):
            return x.flatten(1) @ weight.T

    monkeypatch.setattr("bdclean.checking.margins.Perturber", Linear)
    model.head = torch.nn.Identity()
    model.forward = Linear().features
    found = maximum_margins(model, MarginTest(starts=1, steps=500, lr=0.06, tolerance=0))
    for k, largest in enumerate(found.largest):
        rivals = torch.stack([weight[j] - weight[k] for j in range(8) if j != k]).numpy()
        # The largest t with (w_k - w_j) x >= t for all j, over x in [0, 1]
        best = -linprog(
            [0] * 192 + [-1],
            A_ub=np.column_stack([rivals, np.ones(7)]),
            b_ub=np.zeros(7),
            bounds=[(0, 1)] * 192 + [(None, None)],
        ).fun
        assert 0.95 * best < largest < best + 1e-3


def test_p_by_its_definition():
    largest = [3.0, 2.5, 2.8, 3.3, 9.0, 2.9, 3.1, 2.7]
    found = judge(largest)
    null = [r for r in largest if r != 9.0]
    assert found.target == 4
    assert found.p == pytest.approx(1 - stats.gamma.cdf(9.0, *stats.gamma.fit(null)) ** 8)
    deviations = sorted(abs(r - 2.9) for r in null)
    assert found.z == pytest.approx((9.0 - 2.9) / (1.4826 * deviations[3]))
    assert judge([3.0, 2.5, 2.8, 3.3, 3.2, 2.9, 3.1, 2.7]).p > 0.05


def test_few_classes_are_refused(model):
    model.info = ModelInfo("resnet18", 5, 8, (0.5,) * 3, (0.25,) * 3, width=4)
    with pytest.raises(ConfigError, match="5 classes are too few; it needs 6"):
        maximum_margins(model)
