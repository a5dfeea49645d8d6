"""What a foreign file fits that does not fit what was asked for: another size, width or depth."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from bdclean.backbones.architectures import (
    OWN,
    Parts,
    canonical,
    is_made_for_a_size,
    option_of,
    relatives,
    usual_size,
)
from bdclean.backbones.foreign import Foreign, split_foreign
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.split import ModelInfo, SplitModel
from bdclean.errors import BdcleanError
from bdclean.printable import printable
from bdclean.weights import KeyReport, Nest, match, places

_FEWEST = 4  # names that differ; a relative differs in more
_SHARED = 4  # a relative has one name of so many
_TOKENS = 6  # positions that are none of the image: of the class, of distillation, registers
ODD = (BdcleanError, RuntimeError, TypeError, ValueError, OverflowError)
"""What building a network that a file may be for can raise."""


def what_fits(
    nests: Sequence[Nest], model: SplitModel, state: Mapping[str, Tensor], weights: str | Path
) -> str:
    """Finds what the file was made for, among what is near to what was asked for.

    Args:
        nests: State dicts of the file.
        model: As it was asked for.
        state: That of the file by the names of the model, as far as they fit.
        weights: The file.

    Returns:
        A sentence that follows another one and says what to give; empty if nothing near fits.
    """
    for other in _candidates(nests, model, state):
        try:
            fits = _fits(nests, other, model, weights)
        except ODD:
            continue
        if fits:
            keys = ("arch", "width", "stem", "input_size")
            changed = {
                key: getattr(other, key)
                for key in keys
                if getattr(other, key) != getattr(model.info, key)
            }
            if changed.get("arch", "resnet").rpartition(":")[0]:
                changed.pop("stem", None)  # that of the architecture
            given = ", ".join(f"{key}={value}" for key, value in changed.items())
            options = (f"{option_of(k)} {v}" for k, v in changed.items())
            return f" It fits {given}; on the command line {' '.join(options)}."
    return ""


def _candidates(
    nests: Sequence[Nest], model: SplitModel, state: Mapping[str, Tensor]
) -> Iterator[ModelInfo]:
    backbone, expected = model.backbone.state_dict(), model.state_dict()
    shared = [place.names for nest in nests for place in places(nest.tensors, backbone)]
    if max(shared, default=0) * _SHARED < len(backbone):
        return
    info = replace(model.info, num_classes=None)
    if is_made_for_a_size(info.arch):
        near = sizes(info, model.backbone, state)
        yield from (replace(info, input_size=size) for size in near)
    differ = [k for k, v in expected.items() if k in state and state[k].shape != v.shape]
    if len(expected.keys() ^ state.keys()) + len(differ) < _FEWEST:
        return
    for arch in (info.arch, *relatives(info.arch)):
        if arch in OWN:
            for stem in ("cifar", "imagenet"):
                for width in _widths(nests, arch):
                    yield replace(info, arch=arch, stem=stem, width=width)
        else:
            yield canonical(replace(info, arch=arch, stem="auto", width=64))


def sizes(info: ModelInfo, backbone: nn.Module, state: Mapping[str, Tensor]) -> list[int]:
    """Sizes of images that a file may be for, by how many positions it has.

    Args:
        info: What was built; canonical.
        backbone: As it was built.
        state: That of the file by the names of the model, as far as they fit.

    Returns:
        Other sizes than that of `info`, the likeliest first.
    """
    own, usual = info.input_size, usual_size(info.arch)
    patch = next((m.stride[0] for m in backbone.modules() if isinstance(m, nn.Conv2d)), 1)
    found = [] if usual is None else [usual]
    expected = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for name, tensor in expected.items():
        if name not in state or state[name].shape == tensor.shape:
            continue
        for ours, theirs in zip(tensor.shape, state[name].shape, strict=False):
            for here, there in _grids(ours, theirs):
                found += [there * patch, there * own // here]
        break
    return [size for size in dict.fromkeys(found) if size != own]


def _grids(ours: int, theirs: int) -> Iterator[tuple[int, int]]:
    """Sides of square grids that may have so many positions."""
    if ours == theirs:
        return
    yield ours, theirs
    for tokens in range(_TOKENS):
        here, there = ours - tokens, theirs - tokens
        if here > 0 < there and math.isqrt(here) ** 2 == here and math.isqrt(there) ** 2 == there:
            yield math.isqrt(here), math.isqrt(there)


def _widths(nests: Sequence[Nest], arch: str) -> set[int]:
    """Of what may be the first layer of the network, in the state dicts of a file."""
    first, usual = ("features.0.0.weight", 32) if arch == "mobilenet_v2" else ("conv1.weight", 64)
    return {
        max(1, len(tensor) * 64 // usual)
        for nest in nests
        for name, tensor in nest.tensors.items()
        if name.endswith(first) and tensor.ndim == 4 and tensor.shape[1] == 3
    }


def _fits(nests: Sequence[Nest], info: ModelInfo, asked: SplitModel, weights: str | Path) -> bool:
    same = (info.arch, info.width) == (asked.info.arch, asked.info.width)
    parts = shapes(info, printable(weights), asked.num_features if same else None)
    return fit(nests, parts, weights)[1].ok


def fit(nests: Sequence[Nest], parts: Parts, weights: str | Path) -> tuple[Foreign, KeyReport]:
    """The state dict of a file by the names of a network, and what does not fit.

    Args:
        nests: State dicts of the file.
        parts: The network, of shapes alone.
        weights: The file.

    Raises:
        WeightsError: If the state dict holds more than plain tensors.
    """
    found = split_foreign(nests, parts, weights)
    backbone = {f"backbone.{name}": tensor for name, tensor in parts.backbone.state_dict().items()}
    head = ("head.weight", "head.bias") if found.num_classes is not None else ()
    return found, match(backbone, {k: v for k, v in found.state.items() if k not in head})
