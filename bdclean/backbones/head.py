"""The head of a linear probe, with its normalisation inside."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

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
