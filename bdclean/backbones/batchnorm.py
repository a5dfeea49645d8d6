"""Batch norm's running statistics: keeping them still, and estimating them anew."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


@contextmanager
def momentum_of(model: nn.Module, momentum: float | None) -> Iterator[None]:
    """Sets the momentum of all batch norms for a while.

    Args:
        model: Its batch norms.
        momentum: 0 keeps the running statistics while batches in training mode are normalised
            by their own; None averages over all batches that come.
    """
    norms = batch_norms(model)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.momentum = value


@torch.no_grad()
def reestimate_(
    model: nn.Module, features: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> None:
    """Makes the running statistics the plain mean over `batches` of images.

    Args:
        model: In training mode.
        features: The part of its forward pass to run, (B, 3, H, W) to anything.
        batches: Images (B, 3, H, W), float32 in [0, 1].
    """
    for norm in batch_norms(model):
        norm.reset_running_stats()
    with momentum_of(model, None):
        for images in batches:
            features(images)
