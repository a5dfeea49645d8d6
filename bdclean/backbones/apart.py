"""Any network, taken apart into backbone and head, and put together again.

The head is the linear layer whose result the network returns.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bdclean.backbones.split import SplitModel
from bdclean.errors import ConfigError, in_words

_CLOSE = 1e-3
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Apart:
    """A network without its head.

    Attributes:
        backbone: From normalised images (B, 3, H, W) to features that flatten to (B, D).
        head: The linear layer, from D features to logits.
        name: Of the head, in the state dict of the whole network.
    """

    backbone: nn.Module
    head: nn.Linear
    name: str


def take_apart(
    network: nn.Module, called: str, input_size: int, head_name: str | None = None
) -> Apart:
    """Takes the head out of a network.

    Args:
        network: Maps normalised images to logits. It is changed, and left in evaluation mode.
        called: What messages call it.
        input_size: Side of the images in pixels; a batch of two is passed.
        head_name: Of its head; None finds it.

    Raises:
        ConfigError: If the network does not end in a linear layer, or cannot be copied.
    """
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, input_size, input_size, generator=draw)
    _passed(network, called, images)  # lazy layers get their sizes
    name, head, logits = _find_head(network, called, head_name, images)
    for each, module in list(network.named_modules(remove_duplicate=False)):
        if module is head:  # which may have several names
            network.set_submodule(each, nn.Identity())
    features = _passed(network, called, images)
    if not isinstance(features, Tensor) or features.flatten(1).shape != (2, head.in_features):
        raise _unclear(called, name, {name: head})
    with torch.no_grad():
        again = head(features.flatten(1))
    if not torch.allclose(again, logits, atol=_CLOSE, rtol=_CLOSE):
        raise _unclear(called, name, {name: head})
    copied(network, called)  # as methods will
    return Apart(network, head, name)


def copied(network: Network, called: str) -> Network:
    """A deep copy.

    Raises:
        ConfigError: If the network does not allow that.
    """
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever it holds
        raise ConfigError(
            f"{called}: the network cannot be copied by copy.deepcopy ({in_words(error)}), and "
            "methods need a copy of it."
        ) from error


def joined(network: Network, model: SplitModel) -> Network:
    """A copy of a network with the weights of its parts.

    Args:
        network: That was taken apart; left as it is.
        model: Its parts, changed since; on any device.

    Returns:
        On the device of `network`, and in its mode.
    """
    whole, state = copy.deepcopy(network), model.backbone.state_dict()
    head = model.require_head().state_dict()
    for name in network.state_dict().keys() - state.keys():  # of the head, which may have two names
        state[name] = head[name.rpartition(".")[2]]
    whole.load_state_dict(state)
    return whole


@torch.no_grad()
def _passed(network: nn.Module, called: str, images: Tensor) -> Any:
    network.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            return network(images.clone())  # some networks write into what they get
    except Exception as error:  # whatever the user's code does
        raise ConfigError(
            f"{called} does not take images of shape {tuple(images.shape)}: {in_words(error)}; "
            "is the input_size right, on the command line --data.input_size?"
        ) from error


def _find_head(
    network: nn.Module, called: str, given: str | None, images: Tensor
) -> tuple[str, nn.Linear, Tensor]:
    """The linear layer that gives what the network gives, and that."""
    linear = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear) and name}
    if not linear:
        raise ConfigError(f"{called}: the network has no linear layer within, so it has no head.")
    if given is not None and given not in linear:
        raise ConfigError(
            f"{called}: there is no linear layer {given}; there are {_listed(linear)}."
        )
    gave: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        gave[module] = (output, output.clone())

    hooks = [layer.register_forward_hook(note) for layer in linear.values()]
    try:
        logits = _passed(network, called, images)
    finally:
        for hook in hooks:
            hook.remove()
    _check_logits(called, logits, len(images))
    for name, layer in linear.items():
        if given not in (None, name) or layer not in gave:
            continue
        theirs, as_given = gave[layer]
        same = theirs.data_ptr() == logits.data_ptr() and logits.shape == as_given.shape
        if same and torch.equal(logits, as_given):
            return name, layer, logits
    raise _unclear(called, given, linear)


def _check_logits(called: str, output: object, images: int) -> None:
    kind = f"is a {type(output).__name__}"
    if isinstance(output, Tensor):
        if output.ndim == 2 and len(output) == images:
            return
        kind = f"has the shape {tuple(output.shape)}"
    raise ConfigError(
        f"{called}: its output for two images {kind}; it must be one tensor of logits, of one head "
        "and of the shape (2, classes)."
    )


def _unclear(called: str, given: str | None, linear: Mapping[str, nn.Linear]) -> ConfigError:
    layer = f"its linear layer {given}" if given else "one of its linear layers"
    return ConfigError(
        f"{called}: its output is not what {layer} gives (there are {_listed(linear)}); it must "
        "return the logits of one head as they are, without softmax or an average."
    )


def _listed(names: Mapping[str, Any]) -> str:
    shown = list(names)[-5:]
    return ", ".join([*(["..."] if len(names) > len(shown) else []), *shown])
