"""A copy of a network in training, on which its inputs are perturbed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from bdclean.backbones.batchnorm import batch_norms
from bdclean.backbones.fold import FrozenCopy, frozen_copy
from bdclean.backbones.split import SplitModel

BatchNormMode = Literal["eval", "train"]


@contextmanager
def perturb_precision(device_type: str) -> Iterator[torch.dtype | None]:
    """Autocast for loops of PGD: to bfloat16 where it is on already, else off.

    float16 would lose small gradients of the input, bfloat16 keeps their range.

    Yields:
        The `dtype` for an `Perturber`.
    """
    half = torch.is_autocast_enabled(device_type)
    half = half and torch.get_autocast_dtype(device_type) == torch.bfloat16
    with torch.autocast(device_type, torch.bfloat16, enabled=half):
        yield torch.bfloat16 if half else None


class Perturber:
    """Features of a model, differentiable in the images only.

    It is no `nn.Module`, so that no checkpoint of its owner holds it.

    Args:
        model: Left as it is, its running statistics too. Call `refresh_` when it has changed.
        mode: Batch norm `eval` with running statistics, folded into the convolutions, or `train`
            with those of the batch. All else is in evaluation mode: dropout of any kind is off.
        dtype: Precision inside the folded network; None keeps the model's.
    """

    features: Callable[[Tensor], Tensor]

    def __init__(
        self, model: SplitModel, mode: BatchNormMode = "eval", dtype: torch.dtype | None = None
    ) -> None:
        self._net: FrozenCopy | SplitModel
        if mode == "eval":
            self._net = frozen_copy(model, dtype)
            self.features = self._net.forward
            return
        self._net = model.copy().requires_grad_(False).eval()
        self.features = self._net.features
        for norm in batch_norms(self._net):
            norm.training = True  # not `train()`: those of timm may hold a dropout

    def refresh_(self, model: SplitModel) -> None:
        """Takes over the present weights of the model."""
        if isinstance(self._net, FrozenCopy):
            self._net.refresh_(model)
        else:
            self._net.load_state_dict(model.state_dict())
