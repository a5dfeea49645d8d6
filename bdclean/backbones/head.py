"""Heads on frozen features: the linear probe, and nearest neighbours."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdclean.errors import ConfigError, counted
from bdclean.functional.probe import feature_statistics, logistic_regression, standardise
from bdclean.types import Batch


class ProbeHead(nn.Module):
    """L2-normalise, standardise with stored statistics, then a linear layer.

    Args:
        num_features: D.
        num_classes: K.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, D) to logits (B, K)."""
        logits: Tensor = self.linear(standardise(features, self.mean, self.std))
        return logits

    @torch.no_grad()
    def measure_(self, features: Tensor) -> None:
        """Takes the statistics of the probe's training features (N, D)."""
        mean, std = feature_statistics(features)
        self.mean.copy_(mean)
        self.std.copy_(std)

    @torch.no_grad()
    def solve_(self, features: Tensor, labels: Tensor, c: float) -> None:
        """Sets statistics and linear layer to the solution for features (N, D), labels (N,).

        Raises:
            ConfigError: See `bdclean.functional.probe.logistic_regression`.
        """
        self.measure_(features)
        inputs = standardise(features, self.mean, self.std)
        weight, bias = logistic_regression(inputs, labels, self.linear.out_features, c)
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)


class KNNHead(nn.Module):
    """Votes of the k nearest labelled features, weighted by exp(cosine similarity / temperature).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    CVPR 2018, section 3.4; the usual monitor of self-supervised training, with its usual values.

    Args:
        features: (N, D), of labelled images.
        labels: (N,), int64.
        num_classes: K.
        k: Neighbours; all N where there are fewer.
        temperature: Above 0.

    Raises:
        ConfigError: If there is no image, or a number is out of its range.
    """

    bank: Tensor
    labels: Tensor

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        k: int = 200,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if not len(features) or k < 1 or temperature <= 0:
            raise ConfigError(
                f"k={k} and temperature={temperature} over {counted(len(features), 'image')}: "
                "nearest neighbours need images (data.splits.probe), and both numbers above 0."
            )
        self.num_classes, self.k, self.temperature = num_classes, min(k, len(features)), temperature
        self.register_buffer("bank", F.normalize(features.float(), dim=1).T.contiguous())
        self.register_buffer("labels", labels)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, D) to (B, K): 1 for the class of the heaviest vote, else 0."""
        # Here, because a refused command need not wait for it: it brings timm and more.
        from lightly.utils.benchmarking import knn_predict

        with torch.autocast(features.device.type, enabled=False):
            ranking = knn_predict(
                F.normalize(features.float(), dim=1),
                self.bank,
                self.labels,
                self.num_classes,
                self.k,
                self.temperature,
            )
        return F.one_hot(ranking[:, 0], self.num_classes).float()


@torch.no_grad()
def cache_features(
    features: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> tuple[Tensor, Tensor]:
    """Passes labelled batches once.

    Args:
        features: `SplitModel.features` of a model in evaluation mode.
        batches: With `image` and `label`.

    Returns:
        Features (N, D), float32, and labels (N,), in the order of the batches.
    """
    pairs = [(features(batch["image"]).float(), batch["label"]) for batch in batches]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
