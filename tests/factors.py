"""Ways in which PyTorch keeps the weight of a layer as factors."""

import torch
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)


def _singular(norm):
    def wrap(layer):
        norm(layer)
        layer(torch.rand(1, layer.in_channels, 8, 8))  # one step of the power iteration
        layer.eval()

    return wrap


FACTORS = {
    "pruned": _pruned,
    "weight norm": weight_norm,
    "new weight norm": parametrizations.weight_norm,
    "spectral norm": _singular(spectral_norm),
    "new spectral norm": _singular(parametrizations.spectral_norm),
}
"""What changes a layer in place, by name."""
