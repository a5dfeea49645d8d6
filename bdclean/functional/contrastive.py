"""The contrastive loss of SimCLR, which contrastive backdoor defence (CBD) uses throughout."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bdclean.errors import ConfigError, DataError


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5, *, symmetric: bool = True) -> Tensor:
    r"""Computes the normalised temperature-scaled cross entropy over two sets of features.

    With the rows of :math:`Z = [A; B]` scaled to unit length, :math:`S = Z Z^T / \tau` and
    :math:`p(i)` the other row of the same image,

    .. math:: \ell(i) = -S_{i,p(i)} + \log \sum_{k \ne i} \exp(S_{i,k}),

    averaged over the anchors i. The sum runs over both views, so the denominator holds the
    positive pair and 2N - 2 negatives. Gradients flow into both arguments; a caller that wants
    a stop-gradient detaches the argument.

    Source: Chen et al., SimCLR, ICML 2020, eq. 1; Xiong et al., CBD, BANDS workshop at ICLR
    2023, eq. 7. The text of CBD leaves open whether the rows of B are anchors too; the mean over
    all 2N anchors is the reading of SimCLR.

    Args:
        a: Features (N, D). Row i of `a` and row i of `b` belong to the same image.
        b: Features (N, D).
        temperature: tau, above 0.
        symmetric: Average over all 2N anchors; False: only over the N rows of `a`.

    Returns:
        A scalar, computed in float32 also under autocast.

    Raises:
        ConfigError: The temperature is not positive.
        DataError: The features are not two matrices of one shape.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0")
    if a.ndim != 2 or a.shape != b.shape:
        raise DataError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be paired; "
            "both must be (N, D)"
        )
    n = len(a)
    with torch.autocast(a.device.type, enabled=False):
        z = normalize(torch.cat([a.float(), b.float()]), dim=1)
        anchors = z if symmetric else z[:n]
        similarity = anchors @ z.T / temperature
        row = torch.arange(len(anchors), device=a.device)
        itself = row[:, None] == torch.arange(2 * n, device=a.device)
        partner = (row + n) % (2 * n)
        return cross_entropy(similarity.masked_fill(itself, -torch.inf), partner)
