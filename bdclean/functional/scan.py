"""The maths of SCAn: which classes of a labelled set are a mixture of two groups.

Tang, Wang, Tang, Zhang: Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection. USENIX Security 2021 (arXiv 1908.00686). A centred feature vector is

    x = mu_k + e,   mu_k ~ N(0, S_mu) for each class k,   e ~ N(0, S_e) for each sample

with covariances estimated from clean samples. In a class that was poisoned, the samples scatter
around two means. All in float64, on the device of the input.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bdclean.functional.seeds import derive_seed

MAD_TO_STD = 1.4826  # of a normal distribution: standard deviation / median absolute deviation
MEAN_AD_TO_STD = math.sqrt(math.pi / 2)  # likewise for the mean absolute deviation
_TIE = 1e-9  # values of at most 1 that differ by less are equal


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """Covariances of the two parts of a feature vector.

    Attributes:
        between: S_mu, (d, d), of the class means.
        within: S_e, (d, d), of the samples around their class mean.
        iterations: How many EM took.
    """

    between: Tensor
    within: Tensor
    iterations: int


def fit_global_model(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
) -> GlobalModel:
    """EM for S_mu and S_e from clean samples.

    With n_k samples in class k, of sum s_k:

        E: mu_k = S_e (n_k S_mu + S_e)^+ S_mu S_e^+ s_k
        M: S_mu = cov of mu_k, once per sample;  S_e = cov of x - mu_k

    Both start from the class means. The steps need no sample again, only s_k and the scatter of
    all samples. ^+ is the pseudo-inverse, cov has the divisor M - 1. As in the public code, the M
    step leaves out how uncertain mu_k is: variances of S_mu below 3 S_e / n_k shrink to 0.

    Args:
        features: (M, d), at least two rows.
        labels: (M,), int64 in [0, K). Classes without a sample are allowed.
        num_classes: K.
        max_iterations: Of EM.
        tolerance: EM ends where the Frobenius norms of both changes add up to no more.
    """
    x = features.double()
    x = x - x.mean(0)
    counts = torch.bincount(labels, minlength=num_classes).to(x)
    sums = x.new_zeros(num_classes, x.shape[1]).index_add_(0, labels, x)
    scatter = x.T @ x
    between, within = _covariances(sums / counts.clamp_min(1)[:, None], counts, sums, scatter)
    for iteration in range(1, max_iterations + 1):
        means = _posterior_means(between, within, counts, sums)
        before = between, within
        between, within = _covariances(means, counts, sums, scatter)
        if float((between - before[0]).norm() + (within - before[1]).norm()) <= tolerance:
            return GlobalModel(between, within, iteration)
    return GlobalModel(between, within, max_iterations)


def _posterior_means(between: Tensor, within: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
    """E[mu_k | the samples of class k], (K, d); 0 for a class without samples."""
    means = torch.zeros_like(sums)
    whitened = sums @ _pinv(within) @ between
    for count in set(counts.tolist()):
        rows = counts == count
        means[rows] = whitened[rows] @ _pinv(count * between + within) @ within
    return means


def _covariances(
    means: Tensor, counts: Tensor, sums: Tensor, scatter: Tensor
) -> tuple[Tensor, Tensor]:
    """Covariances of mu_label(i) and of x_i - mu_label(i) over the samples i; sum_i x_i = 0."""
    total = counts.sum()
    mean = counts @ means / total
    weighted = counts[:, None] * means
    square = total * torch.outer(mean, mean)
    between = means.T @ weighted - square
    cross = sums.T @ means
    within = scatter - cross - cross.T + means.T @ weighted - square
    return between / (total - 1), within / (total - 1)


def _pinv(matrix: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv((matrix + matrix.T) / 2, hermitian=True)
    return inverse


def whitening(within: Tensor) -> Tensor:
    """W with W W^T = S_e^+, (d, rank): distances of x W are those of the likelihoods."""
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    cutoff = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    kept = values > cutoff
    root: Tensor = vectors[:, kept] / values[kept].sqrt()
    return root


def split_in_two(x: Tensor, generator: torch.Generator, max_iterations: int = 100) -> Tensor:
    """Iterative linear discriminant analysis with equal covariances, from a random start.

    Each sample goes to the group whose mean is nearer, until no sample moves. It goes to the
    second one where x.(u_2 - u_1) > (|u_2|^2 - |u_1|^2) / 2.

    Args:
        x: (n, r), whitened.
        generator: Of the start, on the CPU.
        max_iterations: At most so many rounds.

    Returns:
        (n,), bool: the second group. Neither is empty, unless all samples are equal or n < 2.
    """
    second = (torch.rand(len(x), generator=generator) >= 0.5).to(x.device)
    if len(x) < 2:
        return torch.zeros_like(second)
    if second.all() or not second.any():
        second[0] = ~second[0]
    for _ in range(max_iterations):
        u1, u2 = x[~second].mean(0), x[second].mean(0)
        moved = x @ (u2 - u1) > (u2.square().sum() - u1.square().sum()) / 2
        if moved.all() or not moved.any() or torch.equal(moved, second):
            break
        second = moved
    return second


def posterior_mean(model: GlobalModel, x: Tensor) -> Tensor:
    """S_mu (n S_mu + S_e)^+ sum(x): E[mu_k | the samples x (n, d) of class k], (d,)."""
    return model.between @ _pinv(len(x) * model.between + model.within) @ x.sum(0)


def likelihood_ratio(x: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """J / n, how much better two means explain the samples of a class than one does.

        J = -2 log(P(x | one) / P(x | two)) = sum_i |x_i - mean|^2 - |x_i - u_group(i)|^2

    Args:
        x: (n, r), whitened.
        second: (n,), bool, the second group; neither group is empty.
        mean: (r,), whitened mean of the class.
    """
    u1, u2 = x[~second].mean(0), x[second].mean(0)
    own = torch.where(second[:, None], u2, u1)
    return ((x - mean).square() - (x - own).square()).sum(1).mean()


def anomaly_index(statistics: Tensor) -> Tensor:
    """|J_k - median| / (1.4826 MAD) of J_k / max J, (K,), non-negative and finite.

    Where more than half of the classes tie, so that MAD = 0, the mean absolute deviation takes
    its place, times sqrt(pi / 2) (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993).
    Where all tie, the index is 0.
    """
    values = statistics / statistics.max().clamp_min(torch.finfo(statistics.dtype).tiny)
    deviation = (values - values.quantile(0.5)).abs()
    deviation = deviation.where(deviation > _TIE, 0)
    scale = MAD_TO_STD * deviation.quantile(0.5)
    if scale == 0:
        scale = MEAN_AD_TO_STD * deviation.mean()
    return deviation / scale if scale > 0 else deviation


def principal_components(x: Tensor, count: int) -> Tensor:
    """The directions of largest variance of the rows of x (N, d), (d, count)."""
    centred = x.double() - x.double().mean(0)
    basis: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:]
    return basis


@dataclass(frozen=True, eq=False)
class Analysis:
    """What SCAn says of K classes and of the N samples that were inspected.

    Attributes:
        statistic: (K,), J_k / n_k.
        index: (K,), of anomaly.
        minor: (N,), bool: in the group of its class that holds fewer known-clean samples.
        margin: (N,), how much nearer the sample is to the mean of that group than to that of the
            other, as a difference of squared distances in units of S_e.
    """

    statistic: Tensor
    index: Tensor
    minor: Tensor
    margin: Tensor


def analyse(
    features: Tensor,
    labels: Tensor,
    clean_features: Tensor,
    clean_labels: Tensor,
    num_classes: int,
    seed: int = 0,
    components: int | None = None,
) -> Analysis:
    """The whole of SCAn but the decision which index is too large.

    S_mu and S_e come from the clean samples. Each class, of inspected and clean samples together,
    is split in two; in all of it, features are centred with their mean over all samples.

    Args:
        features: (N, d), of the samples to inspect.
        labels: (N,), as the data shows them, int64 in [0, K).
        clean_features: (M, d), M >= 2.
        clean_labels: (M,), true.
        num_classes: K.
        seed: Of the random starts.
        components: Work in so many principal components of all features; None in all d.
    """
    x, y = torch.cat([features, clean_features]), torch.cat([labels, clean_labels])
    if components is not None:
        basis = principal_components(x, components)
        x = x.double() @ basis
    model = fit_global_model(x[len(features) :], clean_labels, num_classes)
    whiten, centre = whitening(model.within), x.double().mean(0)
    statistic = centre.new_zeros(num_classes)
    minor, margin = torch.zeros_like(y, dtype=torch.bool), centre.new_zeros(len(y))
    for k in range(num_classes):
        rows = (y == k).nonzero().flatten()
        generator = torch.Generator().manual_seed(derive_seed("scan split", seed, k))
        one = x[rows].double() - centre
        z = one @ whiten
        second = split_in_two(z, generator)
        if second.all() or not second.any():
            continue  # a class of one sample, or of none
        statistic[k] = likelihood_ratio(z, second, posterior_mean(model, one) @ whiten)
        minor[rows] = _fewer_clean(second, rows >= len(features))
        margin[rows] = _margin(z, minor[rows])
    kept = slice(len(features))
    return Analysis(statistic, anomaly_index(statistic), minor[kept], margin[kept])


def _fewer_clean(second: Tensor, clean: Tensor) -> Tensor:
    """The group with fewer clean samples; of two with equally many, the smaller one."""
    counts = [(int((group & clean).sum()), int(group.sum())) for group in (second, ~second)]
    return second if counts[0] <= counts[1] else ~second


def _margin(z: Tensor, minor: Tensor) -> Tensor:
    towards, away = z[minor].mean(0), z[~minor].mean(0)
    return 2 * z @ (towards - away) - towards.square().sum() + away.square().sum()


def rank_by_class(index: Tensor, margin: Tensor, labels: Tensor) -> Tensor:
    """A score of each sample: the index of its class counts first, then its margin.

    Args:
        index: (K,), of anomaly.
        margin: (N,), compared within a class.
        labels: (N,), int64 in [0, K).

    Returns:
        (N,), float32 in [0, 1): the share of the samples that are less suspicious.
    """
    pairs = torch.stack([index[labels], margin], 1)
    _, place, counts = torch.unique(pairs, dim=0, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    share: Tensor = below[place].double() / len(labels)
    return share.float()
