"""The maths of the linear probe on frozen features.

The protocol is that of SSL-Backdoor (Saha et al., CVPR 2022; github.com/UMBCvision/SSL-Backdoor,
`moco/eval_linear.py`): L2-normalise each feature vector, standardise each dimension with the
statistics of the probe's training set, then a linear classifier.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.errors import ConfigError, counted

PROBE_MILESTONES = (0.375, 0.75)  # epochs 15 and 30 of 40: the rate falls to a tenth
VARIANCE_FLOOR = 1e-5  # added to the variance, as in eval_linear.py


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per dimension of L2-normalised features.

    Args:
        features: (N, D), not yet normalised.

    Returns:
        Mean (D,) and sqrt(unbiased variance + 1e-5) (D,), float32.

    Raises:
        ConfigError: If there are fewer than two rows.
    """
    if len(features) < 2:
        raise ConfigError(f"The probe has {counted(len(features), 'image')}; it needs at least 2.")
    # In double, so that the order of the rows and the device do not show in the result.
    variance, mean = torch.var_mean(F.normalize(features.double(), dim=1), dim=0)
    return mean.float(), (variance + VARIANCE_FLOOR).sqrt().float()


def standardise(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """L2-normalises the rows of (N, D) and standardises their columns; float32."""
    return (F.normalize(features.float(), dim=1) - mean) / std


def logistic_regression(
    inputs: Tensor, labels: Tensor, num_classes: int, c: float, max_iterations: int = 1000
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression, solved by L-BFGS from zero; nothing is drawn.

    Minimises ||W||^2 / 2 + c * sum_n CE(W x_n + b, y_n), the objective of scikit-learn's
    `LogisticRegression(C=c)`, in double precision on the CPU.

    Args:
        inputs: (N, D).
        labels: (N,), int64 in [0, K). Classes without a sample are allowed.
        num_classes: K.
        c: Inverse strength of the penalty, > 0.
        max_iterations: Limit of L-BFGS.

    Returns:
        Weight (K, D) and bias (K,), float32 on the CPU.

    Raises:
        ConfigError: If `c` is not positive or a label is out of range.
    """
    if c <= 0:
        raise ConfigError(f"probe_c={c}: it must be above 0.")
    if int(labels.max()) >= num_classes or int(labels.min()) < 0:
        raise ConfigError(
            f"The probe's labels run from {int(labels.min())} to {int(labels.max())}; with "
            f"num_classes={num_classes} they must lie in 0..{num_classes - 1}."
        )
    # A stand-alone validation runs in inference mode, whose tensors know no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        return _solve(inputs.clone(), labels.clone(), num_classes, c, max_iterations)


def _solve(
    inputs: Tensor, labels: Tensor, num_classes: int, c: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    x, y = inputs.detach().double().cpu(), labels.cpu()
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        # Divided by c N, so that the tolerances mean the same for any number of images.
        loss = F.cross_entropy(x @ weight.T + bias, y) + weight.square().sum() / (2 * c * len(x))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach().float(), bias.detach().float()
