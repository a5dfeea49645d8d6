import math

import numpy as np
import pytest
import torch

from bdclean.functional import scan
from bdclean.functional.scan import (
    analyse,
    anomaly_index,
    fit_global_model,
    likelihood_ratio,
    posterior_mean,
    principal_components,
    rank_by_class,
    split_in_two,
    whitening,
)

K = 6


def mixture(
    poisoned=0, distance=0.0, dimensions=8, per_class=80, clean=20, seed=0, target=2, shift=None
):
    """Inspected and clean samples of the model, `poisoned` of the target class moved away."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.double)

    means, mixing = 2 * normal(K, dimensions), normal(dimensions, dimensions) / dimensions**0.5
    labels = torch.arange(K * per_class) % K
    clean_labels = torch.arange(K * clean) % K
    x = means[labels] + normal(len(labels), dimensions) @ mixing + 5
    clean_x = means[clean_labels] + normal(len(clean_labels), dimensions) @ mixing + 5
    truth = torch.zeros(len(labels), dtype=torch.bool)
    truth[(labels == target).nonzero().flatten()[:poisoned]] = True
    direction = normal(dimensions)
    x[truth] += distance * direction / direction.norm() @ mixing
    return x, labels, clean_x, clean_labels, truth


# ---------------------------------------------------------------- literal transcriptions


def slow_global_model(x, y, num_classes, max_iterations=100, tolerance=1e-5):
    """E: mu_k = S_mu (n S_mu + S_e)^-1 sum x. M: covariances over the samples, one by one."""
    x = x - x.mean(0)
    n = [int((y == k).sum()) for k in range(num_classes)]
    mu = [x[y == k].mean(0) for k in range(num_classes)]

    def covariances():
        u = np.stack([mu[k] for k in y])
        e = np.stack([x[i] - mu[k] for i, k in enumerate(y)])
        return np.cov(u.T), np.cov(e.T)

    s_mu, s_e = covariances()
    change, iteration = np.inf, 0
    while change > tolerance and iteration < max_iterations:
        iteration += 1
        for k in range(num_classes):
            mu[k] = s_mu @ np.linalg.inv(n[k] * s_mu + s_e) @ sum(x[i] for i in np.where(y == k)[0])
        old_mu, old_e = s_mu, s_e
        s_mu, s_e = covariances()
        change = np.linalg.norm(s_mu - old_mu) + np.linalg.norm(s_e - old_e)
    return s_mu, s_e, iteration


def slow_split(x, start, f):
    """Linear discriminant analysis with the metric f = S_e^-1, sample by sample."""
    group = start.copy()
    while True:
        u1, u2 = x[~group].mean(0), x[group].mean(0)
        new = np.array([(v - u2) @ f @ (v - u2) < (v - u1) @ f @ (v - u1) for v in x])
        if (new == group).all():
            return group
        group = new


def slow_statistic(x, group, mu, f):
    """-2 log of the ratio of two normal likelihoods, over the number of samples."""
    u = {False: x[~group].mean(0), True: x[group].mean(0)}

    def log_density(v, mean):
        return -(v - mean) @ f @ (v - mean) / 2

    one = sum(log_density(v, mu) for v in x)
    two = sum(log_density(v, u[bool(g)]) for v, g in zip(x, group, strict=True))
    return -2 * (one - two) / len(x)


@pytest.fixture
def poisoned_set():
    return mixture(poisoned=16, distance=8.0)


@pytest.fixture
def fitted(poisoned_set):
    _, _, clean_x, clean_labels, _ = poisoned_set
    return fit_global_model(clean_x, clean_labels, K)


# ---------------------------------------------------------------- the global model


@pytest.mark.parametrize("kept", [120, 97])  # 97: classes of unequal sizes
def test_em_equals_the_literal_one(poisoned_set, kept):
    _, _, x, y, _ = poisoned_set
    x, y = x[:kept] * 3, y[:kept]
    y[:5] = 1
    model = fit_global_model(x.float(), y, K)
    s_mu, s_e, iterations = slow_global_model(x.float().double().numpy(), y.numpy(), K)
    assert model.iterations == iterations
    assert model.between.dtype == torch.double
    np.testing.assert_allclose(model.between.numpy(), s_mu, atol=1e-9)
    np.testing.assert_allclose(model.within.numpy(), s_e, atol=1e-9)


def test_em_stops_at_its_limits(poisoned_set):
    _, _, x, y, _ = poisoned_set
    assert fit_global_model(x, y, K, max_iterations=3, tolerance=0).iterations == 3
    assert fit_global_model(x, y, K, tolerance=1e3).iterations == 1
    second, third = (fit_global_model(x, y, K, n, 0) for n in (2, 3))
    change = float((third.between - second.between).norm() + (third.within - second.within).norm())
    assert fit_global_model(x, y, K, tolerance=1.01 * change).iterations == 3
    assert fit_global_model(x, y, K, tolerance=0.99 * change).iterations == 4


def test_em_finds_the_covariances_it_was_drawn_from():
    g = torch.Generator().manual_seed(0)
    spread_mu, spread_e = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 1.0, 0.7])
    y = torch.arange(8000) % 800
    mu = torch.randn(800, 3, generator=g) * spread_mu
    model = fit_global_model(mu[y] + torch.randn(8000, 3, generator=g) * spread_e, y, 800)
    assert model.between.diagonal().sqrt().tolist() == pytest.approx(spread_mu.tolist(), rel=0.1)
    assert model.within.diagonal().sqrt().tolist() == pytest.approx(spread_e.tolist(), rel=0.1)


def test_features_that_never_vary_and_missing_classes_are_no_trouble(poisoned_set, fitted):
    _, _, x, y, _ = poisoned_set
    model = fit_global_model(torch.cat([x, torch.full((len(x), 2), 7.0)], 1), y, K + 3)
    torch.testing.assert_close(model.between[:8, :8], fitted.between)
    torch.testing.assert_close(model.within[:8, :8], fitted.within)
    assert not model.within[8:].any()
    assert whitening(model.within).shape == (10, 8)


def test_whitening_is_a_root_of_the_pseudo_inverse(fitted):
    w = whitening(fitted.within)
    torch.testing.assert_close(w @ w.T, fitted.within.inverse(), rtol=1e-8, atol=1e-8)


def test_posterior_mean_lies_between_zero_and_the_mean_of_the_class():
    model = scan.GlobalModel(4 * torch.eye(2).double(), torch.eye(2).double(), 1)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    # 4 / (2 * 4 + 1) * sum
    torch.testing.assert_close(posterior_mean(model, x), torch.tensor([16.0, 24.0]).double() / 9)


# ---------------------------------------------------------------- one class


def test_split_equals_the_literal_one(poisoned_set, fitted):
    x, y, _, _, _ = poisoned_set
    one = x[y == 2]
    found = split_in_two(one @ whitening(fitted.within), torch.Generator().manual_seed(4))
    start = torch.rand(len(one), generator=torch.Generator().manual_seed(4)) >= 0.5
    f = np.linalg.inv(fitted.within.numpy())
    assert (found.numpy() == slow_split(one.numpy(), start.numpy(), f)).all()


def test_split_finds_two_groups():
    x = torch.tensor([[0.0], [0.1], [9.0], [0.2], [9.1]]).double()
    second = split_in_two(x, torch.Generator().manual_seed(0))
    assert second.tolist() in ([False, False, True, False, True], [True, True, False, True, False])


def test_split_of_one_sample_and_of_equal_ones():
    def split(x):
        return split_in_two(x, torch.Generator().manual_seed(0))

    assert split(torch.ones(1, 3).double()).tolist() == [False]
    assert split(torch.ones(0, 3).double()).tolist() == []
    assert 0 < split(torch.ones(9, 3).double()).sum() < 9
    # A start that puts both samples into one group is mended.
    for seed in range(8):
        x = torch.tensor([[0.0], [5.0]]).double()
        assert split_in_two(x, torch.Generator().manual_seed(seed)).sum() == 1


def test_statistic_equals_the_literal_one(poisoned_set, fitted):
    x, y, _, _, _ = poisoned_set
    one = x[y == 2] - x.mean(0)
    w = whitening(fitted.within)
    group = split_in_two(one @ w, torch.Generator().manual_seed(1))
    mu = posterior_mean(fitted, one)
    found = float(likelihood_ratio(one @ w, group, mu @ w))
    f = np.linalg.inv(fitted.within.numpy())
    assert found == pytest.approx(slow_statistic(one.numpy(), group.numpy(), mu.numpy(), f))


# ---------------------------------------------------------------- all classes


def test_anomaly_index_is_the_deviation_in_mads():
    values = torch.tensor([1.0, 2.0, 4.0, 7.0, 20.0]).double()
    # median 4, deviations 3 2 0 3 16 of 20, their median 3
    wanted = torch.tensor([3.0, 2.0, 0.0, 3.0, 16.0]).double() / (1.4826 * 3)
    torch.testing.assert_close(anomaly_index(values), wanted)
    torch.testing.assert_close(anomaly_index(7 * values), wanted)
    # an even number of classes: the mean of the two in the middle
    assert anomaly_index(values[:4]).tolist() == pytest.approx(
        [x / (1.4826 * 1.5) for x in (2.0, 1.0, 1.0, 4.0)]
    )


def test_anomaly_index_where_most_classes_tie():
    rounding = torch.tensor([0, 1e-12, 0, -1e-12, 2e-12], dtype=torch.double)
    values = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0]).double() + rounding
    found = anomaly_index(values)
    assert found[2].item() == pytest.approx(5 / math.sqrt(math.pi / 2))
    assert found[[0, 1, 3, 4]].tolist() == [0.0] * 4
    assert anomaly_index(torch.full((4,), 3.0).double()).tolist() == [0.0] * 4
    assert anomaly_index(torch.zeros(4).double()).tolist() == [0.0] * 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("poisoned", [16, 60])  # fewer or more than the clean samples of the class
def test_the_poisoned_class_and_its_samples_are_found(seed, poisoned):
    *data, truth = mixture(poisoned, 8.0, seed=seed)
    found = analyse(*data, K, seed)
    assert found.index.argmax() == 2
    assert found.index[2] > math.e**2
    assert (found.minor & (data[1] == 2)).tolist() == truth.tolist()
    inside = data[1] == 2
    assert found.margin[truth].min() > 0 > found.margin[inside & ~truth].max()


def test_classes_of_one_group_have_small_indices():
    *data, _ = mixture(per_class=400, clean=60)
    assert analyse(*data, K).index.max() < math.e**2


@pytest.mark.parametrize("components", [None, 3])
def test_analysis_equals_the_literal_one(poisoned_set, components):
    x, y, clean_x, clean_y, _ = poisoned_set
    found = analyse(x, y, clean_x, clean_y, K, 5, components)
    everything, labels = np.concatenate([x, clean_x]), np.concatenate([y, clean_y])
    if components:
        _, _, rows = np.linalg.svd(everything - everything.mean(0))
        everything = everything @ rows[:components].T
    s_mu, s_e, _ = slow_global_model(everything[len(x) :], clean_y.numpy(), K)
    f, everything = np.linalg.inv(s_e), everything - everything.mean(0)
    statistic, is_clean = [], np.arange(len(labels)) >= len(x)
    for k in range(K):
        one = everything[labels == k]
        kept = found.minor[y == k].numpy()
        mu = s_mu @ np.linalg.inv(len(one) * s_mu + s_e) @ one.sum(0)
        # The split is that of the samples' own assignment: find which side the clean ones are on.
        start = torch.Generator().manual_seed(scan.derive_seed("scan split", 5, k))
        group = slow_split(one, (torch.rand(len(one), generator=start) >= 0.5).numpy(), f)
        clean = is_clean[labels == k]
        if (group & clean).sum() > (~group & clean).sum():
            group = ~group
        assert (kept == group[~clean]).all()
        statistic.append(slow_statistic(one, group, mu, f))
        u1, u2 = one[~group].mean(0), one[group].mean(0)
        margin = [(v - u1) @ f @ (v - u1) - (v - u2) @ f @ (v - u2) for v in one[~clean]]
        np.testing.assert_allclose(found.margin[y == k].numpy(), margin, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.statistic.numpy(), statistic, rtol=1e-6)
    torch.testing.assert_close(found.index, anomaly_index(found.statistic))


def test_equally_many_clean_samples_leave_the_smaller_group():
    second = torch.tensor([True, True, True, False, True, False])
    clean = torch.tensor([True, False, False, True, False, False])
    assert scan._fewer_clean(second, clean).equal(~second)
    assert scan._fewer_clean(~second, clean).equal(~second)


def test_a_class_that_is_not_inspected_is_split_all_the_same(poisoned_set):
    x, y, clean_x, clean_y, _ = poisoned_set
    kept = y != 4
    found = analyse(x[kept], y[kept], clean_x, clean_y, K)
    assert len(found.minor) == len(found.margin) == int(kept.sum())
    assert found.index.isfinite().all()
    assert found.statistic[4] > 0


def test_principal_components_are_those_of_largest_variance():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 3, 1])
    basis = principal_components(x + 50, 2)
    assert basis.shape == (4, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2).double())
    assert basis[1:3].square().sum() > 1.9


def test_the_class_counts_first_and_then_the_margin():
    index = torch.tensor([0.5, 9.0, 0.1])
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    margin = torch.tensor([50.0, -3.0, 99.0, -7.0, 4.0, 4.0])
    score = rank_by_class(index, margin, labels)
    assert score.dtype == torch.float32
    assert (score * 6).round().tolist() == [2, 3, 0, 1, 4, 4]
