"""Copies of a network for loops of PGD, which only need gradients of the input."""

import copy
import logging
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from bdclean.backbones.split import Normalize, SplitModel

log = logging.getLogger(__name__)


class FrozenCopy(nn.Module):
    """A frozen network in evaluation mode; see `frozen_copy`.

    Args:
        normalize: Kept in float32, where a perturbation of one grey level is still exact.
        network: What follows, in `dtype`.
        dtype: Precision of `network`.
        folded: Names of layer and batch norm, for each pair that was folded.
    """

    def __init__(
        self,
        normalize: Normalize | None,
        network: nn.Module,
        dtype: torch.dtype | None,
        folded: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.dtype = dtype
        self.folded = dict(folded)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) to features (B, D), in the precision of `x`."""
        inputs = x if self.normalize is None else self.normalize(x)
        if self.dtype is not None:
            inputs = inputs.to(self.dtype)
        return torch.flatten(self.network(inputs), 1).to(x.dtype)

    @torch.no_grad()
    def refresh_(self, model: nn.Module) -> None:
        """Takes over the present weights of the model that was copied, folding them anew.

        A few small operations per layer, so it can be done in every training step; a new
        `frozen_copy` traces the network each time.
        """
        source = model.backbone if isinstance(model, SplitModel) else model
        state, own = source.state_dict(), self.network.state_dict()
        for layer, norm_name in self.folded.items():
            norm = source.get_submodule(norm_name)
            assert isinstance(norm, _BatchNorm)  # noqa: S101  (`fuse` folds nothing else)
            weight, bias = _folded(state[f"{layer}.weight"], state.get(f"{layer}.bias"), norm)
            own.pop(f"{layer}.weight").copy_(weight)
            own.pop(f"{layer}.bias").copy_(bias)
        for name, tensor in own.items():
            tensor.copy_(state[name])


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> FrozenCopy:
    """Copies a network for a loop of gradient steps on its input.

    Batch norms are folded into the convolutions before them, no parameter requires a gradient,
    and everything is in evaluation mode and channels_last. A network that torch.fx cannot trace
    or fold, or without such batch norms, is copied as it is. The copy follows later changes of
    `model` when its `refresh_` is called.

    Args:
        model: Left as it is. Of a `SplitModel` the copy gives `features`.
        dtype: Precision inside, for example `torch.bfloat16`; images, features and the gradient
            of the images stay in theirs. None keeps the model's.

    Returns:
        A module from images (B, 3, H, W) to features (B, D) on the model's device.
    """
    source = model.backbone if isinstance(model, SplitModel) else model
    normalize = copy.deepcopy(model.normalize).eval() if isinstance(model, SplitModel) else None
    network, folded = _fold(copy.deepcopy(source).eval())
    network = network.requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 4:  # `Module.to` would try those of five dimensions too, and fail
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if dtype is not None:
        network = network.to(dtype)
    return FrozenCopy(normalize, network, dtype, folded).eval()


def _fold(network: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Folds batch norms into a copy of `network` (evaluation mode), or returns it as it is.

    Returns:
        The network, and the name of the batch norm by that of the layer that took it in.
    """
    if any(_is_hidden_from_traces(module) for module in network.modules()):
        return network, {}
    try:
        # Submodules are shared, but `fuse` replaces those of the trace: `network` stays whole.
        fused, folded = _fuse(fx.symbolic_trace(network))
        constants = fused.state_dict().keys() - network.state_dict().keys()
        constants -= {f"{layer}.bias" for layer in folded}
    except Exception as error:  # tracing runs the network's own code on proxies: anything can fail
        log.info("Batch norms of %s are not folded: %s", type(network).__name__, error)
        return network, {}
    # What the trace computed once (`_tensor_constant0`) could not be refreshed.
    if not folded or constants:
        return network, {}
    return fused, folded


def _is_hidden_from_traces(module: nn.Module) -> bool:
    """Whether a module does something that a trace of it would not."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or parametrize.is_parametrized(module)


def _fuse(traced: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """Folds batch norms into `traced`; without a name in the second result, none was folded."""
    layers = [
        node.target
        for node in traced.graph.nodes
        if node.op == "call_module"
        and isinstance(traced.get_submodule(str(node.target)), nn.Conv2d | nn.Linear)
    ]
    if len(set(layers)) < len(layers):
        # A layer that is used twice cannot take in the batch norm of one of its uses.
        return traced, {}
    inputs = {
        str(node.target): str(node.args[0].target)
        for node in traced.graph.nodes
        if node.op == "call_module"
        and isinstance(traced.get_submodule(str(node.target)), _BatchNorm)
    }
    # In place and without tracing: it is a copy already, and traced.
    fused = cast(fx.GraphModule, fuse(traced, inplace=True, no_trace=True))
    left = {str(node.target) for node in fused.graph.nodes if node.op == "call_module"}
    return fused, {layer: norm for norm, layer in inputs.items() if norm not in left}


def _folded(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer (output channels first) with the batch norm after it."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None  # noqa: S101  (`fuse` leaves norms without statistics alone)
    assert variance is not None  # noqa: S101
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = (-mean if bias is None else bias - mean) * scale
    if norm.affine:
        shift = shift + norm.bias
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift
