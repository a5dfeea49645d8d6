"""The blocks of a network that nobody knows, by the order in which an image passes them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bdclean.functional.reinitialisation import maskable_count

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Passed:
    """A block of such a network.

    Attributes:
        modules: Its modules.
        side: Of what it gives, in pixels; None where that is no image.
        extra: Parameters of the network itself.
    """

    modules: list[nn.Module]
    side: int | None = None
    extra: list[nn.Parameter] = field(default_factory=list)


def passed_blocks(backbone: nn.Module, input_size: int) -> list[Passed]:
    """Runs the network once and lists its blocks.

    A block is a child of the network, or of a container of torch in it, that holds a convolution or
    a linear layer. What holds neither, such as a batch norm, belongs to the block before.
    Parameters of the network itself belong to the first block.

    Args:
        backbone: Left as it is.
        input_size: Side of the images, in pixels.

    Returns:
        The blocks in the order in which they are passed; empty if none is.
    """
    units = _units(backbone)
    if not units:
        return []
    sides = _sides(backbone, units, input_size)
    called = [unit for unit in sides if unit in units]
    blocks: list[Passed] = []
    for unit in called:
        if blocks and not maskable_count(unit):
            blocks[-1].modules.append(unit)
        elif blocks and not any(map(maskable_count, blocks[-1].modules)):
            blocks[-1].modules.append(unit)  # a norm of the pixels comes first
            blocks[-1].side = sides[unit]
        else:
            blocks.append(Passed([unit], sides[unit]))
    if blocks:
        # what is used otherwise than by a call
        blocks[-1].modules += [unit for unit in units if unit not in sides]
        inside = {id(p) for unit in units for p in unit.parameters()}
        blocks[0].extra = [p for p in backbone.parameters() if id(p) not in inside]
    return blocks


def _units(network: nn.Module) -> list[nn.Module]:
    units = [unit for unit in _flat(network) if any(True for _ in unit.parameters())]
    if len(units) == 1 and any(True for _ in units[0].children()):
        return _units(units[0])  # a wrapper
    return list(dict.fromkeys(units))


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in _CONTAINERS:
            yield from _flat(child)
        else:
            yield child


@torch.no_grad()
def _sides(
    backbone: nn.Module, units: list[nn.Module], input_size: int
) -> dict[nn.Module, int | None]:
    """Sides of the images that modules give, by module in the order of their first calls."""
    sides: dict[nn.Module, int | None] = {}

    def note(unit: nn.Module, _: object, output: object) -> None:
        image = isinstance(output, Tensor) and output.ndim == 4
        sides.setdefault(unit, output.shape[-1] if image else None)  # type: ignore[attr-defined]

    modes = {module: module.training for module in backbone.modules()}
    hooks = [unit.register_forward_hook(note) for unit in units]
    first = next(backbone.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            images = torch.zeros(2, 3, input_size, input_size, device=first.device)
            backbone.eval()(images.to(first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return sides
