import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from bdclean.errors import ConfigError
from bdclean.functional.probe import feature_statistics, logistic_regression, standardise


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(60, 8, generator=generator) + 1


def test_statistics_are_those_of_eval_linear(features):
    mean, std = feature_statistics(features)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(mean, unit.mean(0))
    torch.testing.assert_close(std, (unit.var(0, unbiased=True) + 1e-5).sqrt())
    torch.testing.assert_close(standardise(features, mean, std), (unit - mean) / std)


def test_standardised_features_do_not_depend_on_their_length(features):
    mean, std = feature_statistics(features)
    scaled = features * torch.linspace(0.5, 4, 60)[:, None]
    torch.testing.assert_close(standardise(features, mean, std), standardise(scaled, mean, std))


@pytest.mark.parametrize("c", [0.05, 1.0])
def test_logistic_regression_is_that_of_scikit_learn(features, c):
    labels = (features[:, 0] > 1).long() + (features[:, 1] > 2).long()
    weight, bias = logistic_regression(features, labels, 3, c)
    oracle = LogisticRegression(C=c, max_iter=5000, tol=1e-10).fit(
        features.double().numpy(), labels.numpy()
    )
    torch.testing.assert_close(weight, torch.tensor(oracle.coef_).float(), rtol=1e-3, atol=1e-4)
    # The bias has no penalty: it is fixed up to a constant.
    wanted = torch.tensor(oracle.intercept_).float()
    torch.testing.assert_close(bias - bias.mean(), wanted - wanted.mean(), rtol=1e-3, atol=1e-4)


def test_a_class_without_samples_is_never_chosen(features):
    labels = (features[:, 0] > 1).long()
    weight, bias = logistic_regression(features, labels, 4, 1.0)
    assert weight.shape == (4, 8)
    assert int((F.linear(features, weight, bias).argmax(1)).max()) <= 1


def test_solution_is_the_same_each_time_and_needs_no_gradient_mode(features):
    labels = torch.arange(60) % 3
    first = logistic_regression(features, labels, 3, 0.1)
    with torch.no_grad():
        second = logistic_regression(features, labels, 3, 0.1)
    with torch.inference_mode():
        third = logistic_regression(features * 1, labels, 3, 0.1)
    for other in (second, third):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


def test_refuses_what_cannot_be_fitted(features):
    with pytest.raises(ConfigError, match=r"probe_c=0.0.*above 0"):
        logistic_regression(features, torch.zeros(60, dtype=torch.long), 2, 0.0)
    with pytest.raises(ConfigError, match=r"labels run from 0 to 4.*num_classes=3.*0..2"):
        logistic_regression(features, torch.arange(60) % 5, 3, 1.0)
    with pytest.raises(ConfigError, match="has 1 image; it needs at least 2"):
        feature_statistics(features[:1])
