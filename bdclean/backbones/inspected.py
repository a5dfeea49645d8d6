"""What a weights file holds: network, classes, images, and what is left over. Nothing is trained.

It is for people who do not know yet what a file is, so it goes on where `load_model` stops.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bdclean.backbones.architectures import full_name
from bdclean.backbones.build import load_model
from bdclean.backbones.foreign import Foreign
from bdclean.backbones.guess import guess
from bdclean.backbones.near import ODD, fit
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.split import ModelInfo
from bdclean.errors import BdcleanError, WeightsError
from bdclean.files import FORMAT_KEY
from bdclean.printable import printable
from bdclean.weights import FileFacts, Nest, describe, read_nests

_LISTED = 100  # names of each kind


@dataclass(frozen=True)
class StateDict:
    """A dict of tensors in a file.

    Attributes:
        where: Keys that lead to it, joined by dots; "" for the whole file.
        tensors: How many.
        numbers: How many all tensors have together.
        others: Names of its entries that are no plain tensors.
    """

    where: str
    tensors: int
    numbers: int
    others: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """An architecture that a file fits.

    Attributes:
        arch: Canonical name.
        width: Channels of the first layer, 64 for published networks.
        stem: Of our own ResNets and MobileNetV2.
        input_size: Side of the images in pixels.
        mean: Of the normalisation, in units of [0, 1] pixels: the file's, if it holds one, else
            that which the architecture was published with.
        std: As `mean`.
        num_classes: Outputs of the classifier; None without one.
        others: Less common architectures with the same tensors that compute something else.
    """

    arch: str
    width: int
    stem: str
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int | None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What is known of a weights file.

    Attributes:
        file: From outside: kind, size, hash, what its pickle names.
        unreadable: Why nothing in it is read, and the way out; None if it is.
        unusable: Why `load_model` refuses it as it is, and the way out; None if it loads.
        metadata: What a safetensors file, or a file of ours, says of itself.
        state_dicts: All of them, the outer ones first.
        dtypes: Tensors and numbers by precision.
        not_finite: Names of tensors that hold NaN or infinite numbers.
        candidates: Architectures that it fits; one is what `load_model` takes.
        evidence: Why, in one sentence; of a file that fits none, the nearest.
        where: Keys and names that lead to the network; "" is the top level.
        library: Whose names the network has, "" for those of torchvision or timm.
        copies: Where else the network is.
        beside: Names in the network's dict that belong to its architecture, and are not used.
        leftovers: Names in the network's dict that no network takes.
    """

    file: FileFacts
    unreadable: str | None = None
    unusable: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    state_dicts: tuple[StateDict, ...] = ()
    dtypes: dict[str, tuple[int, int]] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    evidence: str = ""
    where: str = ""
    library: str = ""
    copies: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()


def inspect(weights: str | Path) -> Inspection:
    """Looks at a weights file. Nothing in it is executed.

    Args:
        weights: The file, of any kind.

    Returns:
        All that can be told of it. A file that cannot be read safely is told from outside.

    Raises:
        WeightsError: If there is no such file, or it cannot be opened.
    """
    file = describe(weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unfinished runs; loading tells
            nests, metadata = read_nests(weights)
    except WeightsError as error:
        return Inspection(file, unreadable=str(error))
    known: dict[str, Any] = {
        "metadata": {printable(key): printable(value) for key, value in metadata.items()},
        "state_dicts": tuple(map(_state_dict, nests[:_LISTED])),
        "dtypes": _dtypes(nests),
        "not_finite": tuple(_not_finite(nests))[:_LISTED],
        "unusable": _refusal(weights),
    }
    with suppress(*ODD):  # `unusable` says it
        known |= _network(nests, metadata, weights)
    return Inspection(file, **known)


def _state_dict(nest: Nest) -> StateDict:
    numbers = sum(tensor.numel() for tensor in nest.tensors.values())
    return StateDict(printable(nest.where), len(nest.tensors), numbers, _names(nest.others))


def _names(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(printable, names[:_LISTED]))


def _tensors(nests: Sequence[Nest]) -> Iterator[tuple[str, Tensor]]:
    for nest in nests:
        for name, tensor in nest.tensors.items():
            yield printable(f"{nest.where}.{name}".lstrip(".")), tensor


def _dtypes(nests: Sequence[Nest]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for _, tensor in _tensors(nests):
        kind = str(tensor.dtype).removeprefix("torch.")
        tensors, numbers = found.get(kind, (0, 0))
        found[kind] = tensors + 1, numbers + tensor.numel()
    return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))


def _not_finite(nests: Sequence[Nest]) -> Iterator[str]:
    for name, tensor in _tensors(nests):
        if tensor.is_floating_point() or tensor.is_complex():
            wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no test
            if not bool(wide.isfinite().all()):
                yield name


def _refusal(weights: str | Path) -> str | None:
    """What `load_model` says of a file that it does not take."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_model(weights)
    except BdcleanError as error:
        return str(error)
    return None


def _network(
    nests: Sequence[Nest], metadata: Mapping[str, str], weights: str | Path
) -> dict[str, Any]:
    """The fields of an inspection that tell of the network."""
    if FORMAT_KEY in metadata:
        info = ModelInfo.from_metadata(metadata)
        return {
            "candidates": (_candidate(info, info.num_classes, {}),),
            "evidence": "The metadata of the file says so.",
        }
    guesses = guess(nests, weights)
    if not guesses:
        return {}
    first = guesses[0].info
    found, _ = fit(nests, shapes(first, printable(weights)), weights)
    return {
        "candidates": tuple(
            _candidate(each.info, found.num_classes, found.normalisation, each.others)
            for each in guesses
        ),
        "evidence": _evidence(found, guesses[0].tensors),
        "where": printable(f"{found.nest.where}.{found.prefix}".strip(".")),
        "library": found.library,
        "copies": tuple(copy.name for copy in found.copies),
        "beside": _names([source.name for source in found.kept]),
        "leftovers": _names(_leftovers(found)),
    }


def _candidate(
    info: ModelInfo,
    num_classes: int | None,
    normalisation: Mapping[str, Tensor],
    others: tuple[str, ...] = (),
) -> Candidate:
    colours = {
        key: tuple(normalisation[key].tolist()) if key in normalisation else getattr(info, key)
        for key in ("mean", "std")
    }
    return Candidate(
        full_name(info.arch),
        info.width,
        info.stem,
        info.input_size,
        num_classes=num_classes,
        others=others,
        **colours,
    )


def _evidence(found: Foreign, count: int) -> str:
    """Which tensors tell of the architecture."""
    said = f"{count} tensors have its names and shapes"
    body = [several for ours, several in found.sources.items() if ours.startswith("backbone.")]
    convolutions = [each for each in body if each[0].tensor.ndim == 4]
    first = next(iter(convolutions or body), ())
    layers = {"first layer": first, "classifier": found.sources.get("head.weight", ())}
    for what, sources in layers.items():
        if sources:
            layer = sources[0]
            said += f"; {what} {printable(layer.name)} {tuple(layer.tensor.shape)}"
    return said


def _leftovers(found: Foreign) -> list[str]:
    used = {
        (source.nest.keys, source.name)
        for several in (*found.sources.values(), found.kept)
        for source in several
    }
    return [name for name in found.nest.tensors if (found.nest.keys, name) not in used]
