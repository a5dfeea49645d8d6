"""The architecture of a foreign file that names none, by the names and shapes of its tensors."""

import gzip
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from bdclean.backbones.architectures import (
    DEFAULT_INPUT_SIZE,
    OWN,
    SMALL_IMAGE,
    Parts,
    canonical,
    has_width,
    is_made_for_a_size,
    is_published,
    option_of,
    usual_colours,
    usual_size,
)
from bdclean.backbones.cifar import fitting_cifar
from bdclean.backbones.dialects import translated
from bdclean.backbones.foreign import is_of_solo_learn
from bdclean.backbones.near import ODD, fit, sizes
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.split import ModelInfo, Stem
from bdclean.errors import ConfigError
from bdclean.printable import printable
from bdclean.weights import Nest

INDEX = "signatures.json.gz"
"""Beside this file; tests/benchmarks/signatures.py writes it."""

Shape = tuple[int, ...]
_KEYS = ("input_size", "width", "stem")
_NESTS = 4  # of a file, the largest ones, that may hold the network
_TENSORS = 50_000  # of one dict; no known network has a tenth
_COPIES = 4  # a file may hold so many times the weights of a network, ...
_BESIDE = 32  # ... and so many tensors for each of them
_FIRST = 3  # layers that may be the first one
_NETWORKS = 8  # that are tried
_NEAR = 0.5  # of the weights of a file and of a network, in common
_SHOWN = 8


@dataclass(frozen=True)
class Guess:
    """What a file may be.

    Attributes:
        info: Canonical; mean and std are those that the architecture was published with.
        tensors: How many tensors of the file belong to it, its classifier included.
        others: Less common architectures with the same tensors that compute something else.
    """

    info: ModelInfo
    tensors: int
    others: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What to load the file with."""
        own = _choices(self.info.arch)
        return {key: getattr(self.info, key) for key in ("arch", "input_size", *own)}


@dataclass(frozen=True)
class Network:
    """Architectures with equal tensors.

    Attributes:
        weights: How many tensors of two dimensions or more have each shape, at any input size.
        functions: Canonical names, those together that compute the same.
    """

    weights: Counter[Shape]
    functions: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Dict:
    """The weights of one dict of a file, by their shapes, and how many tensors are there."""

    weights: Counter[Shape]
    tensors: int

    def holds(self, network: Counter[Shape]) -> bool:
        """Whether all shapes of a network are there, and not lost among others."""
        size = network.total()
        is_much = self.weights.total() <= _COPIES * size and self.tensors <= _BESIDE * size
        return is_much and all(count <= self.weights[shape] for shape, count in network.items())

    def likeness(self, network: Counter[Shape]) -> float:
        """Shapes in common, as a share of all."""
        common = sum(min(count, self.weights[shape]) for shape, count in network.items())
        return common / max(1, self.weights.total() + network.total() - common)


@lru_cache(maxsize=1)
def known_networks() -> tuple[Network, ...]:
    """Those of torchvision and timm, the largest first."""
    packed = resources.files("bdclean.backbones").joinpath(INDEX).read_bytes()
    content = json.loads(gzip.decompress(packed))
    numbered = [tuple(shape) for shape in content["shapes"]]
    networks = (
        Network(
            Counter({numbered[number]: count for number, count in each["shapes"]}),
            tuple(map(tuple, each["functions"])),
        )
        for each in content["networks"]
    )
    return tuple(sorted(networks, key=lambda network: -network.weights.total()))


def guess(
    nests: Sequence[Nest],
    weights: str | Path,
    given: Mapping[str, Any] | None = None,
    *,
    colours_known: bool = False,
) -> list[Guess]:
    """Finds the architectures that a file fits exactly.

    Architectures that compute the same with the same tensors count once, under the plainest name,
    if they were published for images of the same size, mean and std, as far as these are not known.

    Args:
        nests: State dicts of the file.
        weights: The file.
        given: Of `width`, `stem` and `input_size` what is known.
        colours_known: Whether mean and std are known, so that those of architectures do not matter.

    Returns:
        The architectures, the plainest name first; empty if none fits.
    """
    known = {key: value for key, value in (given or {}).items() if key in _KEYS}
    if found := guess_own(nests, weights, known):
        return found
    dicts = _dicts(nests, weights)
    networks = (each for each in known_networks() if any(d.holds(each.weights) for d in dicts))
    for network in islice(networks, _NETWORKS):
        if more := _of_network(nests, weights, network, known, colours_known):
            return more
    return []


def guess_own(
    nests: Sequence[Nest], weights: str | Path, given: Mapping[str, Any] | None = None
) -> list[Guess]:
    """As `guess`, among our own networks alone."""
    dicts, found = _dicts(nests, weights), list[Guess]()
    for info in _own(dicts, nests, given or {}):
        inside = _shapes_of(_parts(info, weights))
        if any(each.holds(inside) for each in dicts):
            found += _fitting(nests, weights, info)
    return found


def nearest(nests: Sequence[Nest], weights: str | Path) -> str:
    """The known network that a file is nearest to, for a file that fits none.

    Returns:
        A sentence that follows another one; empty if nothing is near.
    """
    dicts = _dicts(nests, weights)

    def likeness(network: Counter[Shape]) -> float:
        return max((each.likeness(network) for each in dicts), default=0)

    best, info = _NEAR, None
    for own in _own(dicts, nests, {}):
        if (like := likeness(_shapes_of(_parts(own, weights)))) > best:
            best, info = like, own
    for network in known_networks():
        if (like := likeness(network.weights)) > best:
            name = min((n for names in network.functions for n in names), key=_plainness)
            best, info = like, next(_described(name, {}), info)
    if info is None:
        return ""
    try:
        _, report = fit(nests, _parts(info, weights), weights)
    except ODD:
        return ""
    return f" It is nearest to {info.arch}, with {report.message()}." if not report.ok else ""


def one_of(guesses: Sequence[Guess], weights: str | Path) -> Guess:
    """The only guess.

    Raises:
        ConfigError: If there are several; it lists them with what they differ in.
    """
    if len(guesses) == 1:
        return guesses[0]
    infos = [each.info for each in guesses]
    keys = ("width", "stem", "input_size", "mean", "std")
    differ = [key for key in keys if len({getattr(info, key) for info in infos}) > 1]
    listed = []
    for info in infos[:_SHOWN]:
        facts = ", ".join(f"{key} {_plain(getattr(info, key))}" for key in differ)
        listed.append(f"{info.arch} ({facts})" if facts else info.arch)
    more = ", ..." if len(infos) > _SHOWN else ""
    one_name = len({info.arch for info in infos}) == 1
    decisive = [key for key in ("input_size", *differ) if key in differ]  # it decides the stem too
    key = next((key for key in decisive if one_name), "arch")
    raise ConfigError(
        f"{printable(weights)} fits several architectures: {', '.join(listed)}{more}; name one "
        f"with {key}, on the command line {option_of(key)}."
    )


def taken_for(taken: Guess, info: ModelInfo, given: Mapping[str, Any], weights: str | Path) -> str:
    """What is said of a file that is read by a guess.

    Args:
        taken: The guess.
        info: Of the model that was made of it.
        given: What the caller knew of it.
        weights: The file.
    """
    published = {"mean": taken.info.mean, "std": taken.info.std}
    as_published = (info.mean, info.std) == (taken.info.mean, taken.info.std)
    keys = [
        *_choices(info.arch),
        *(("input_size",) if "input_size" not in given else ()),
        *(key for key in published if as_published and key not in given),
    ]
    facts = "".join(f", {key} {_plain(getattr(info, key))}" for key in keys)
    said = f"{printable(weights)}: taken for {info.arch} by its {taken.tensors} tensors{facts}"
    if taken.others:
        others = ", ".join(taken.others[:_SHOWN])
        said += f"; of the same tensors but less common: {others}"
    if not as_published and not has_width(info.arch):
        own = " and ".join(f"{key} {_plain(value)}" for key, value in published.items())
        said += f"; it was published with {own}"
    return f"{said}; --model.arch names another."


def _choices(arch: str) -> tuple[str, ...]:
    """What else than its name tells which network it is."""
    return ("width", "stem")[: has_width(arch) + (arch in OWN)]


def _plain(value: object) -> str:
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def _dicts(nests: Sequence[Nest], weights: str | Path) -> list[_Dict]:
    largest = heapq.nlargest(_NESTS, nests, key=lambda nest: len(nest.tensors))
    return [
        _Dict(_count(translated(nest, weights).nest.tensors), len(nest.tensors))
        for nest in largest
        if len(nest.tensors) <= _TENSORS
    ]


def _count(state: Mapping[str, Tensor]) -> Counter[Shape]:
    return Counter(tuple(tensor.shape) for tensor in state.values() if tensor.ndim > 1)


def _shapes_of(parts: Parts) -> Counter[Shape]:
    return _count(parts.backbone.state_dict())


def _parts(info: ModelInfo, weights: str | Path) -> Parts:
    return shapes(info, printable(weights))


def _described(arch: str, given: Mapping[str, Any]) -> Iterator[ModelInfo]:
    """An architecture, canonical, if there is one that agrees with what is given."""
    size = usual_size(arch) or DEFAULT_INPUT_SIZE
    mean, std = usual_colours(arch)
    try:
        yield canonical(ModelInfo(arch, None, **{"input_size": size, **given}, mean=mean, std=std))
    except ConfigError:
        return


def _own(
    dicts: Sequence[_Dict], nests: Sequence[Nest], given: Mapping[str, Any]
) -> Iterator[ModelInfo]:
    """Our own networks of any width that may begin with a layer of the file.

    Without the resnets that torchvision has too.
    """
    there = sum((each.weights for each in dicts), Counter[Shape]())
    layers = (shape for shape in there if len(shape) == 4 and shape[1] == 3)
    for channels, _, side, _ in islice(layers, _FIRST):
        stem: Stem = "cifar" if side == 3 else "imagenet"
        last = (8 * channels, 8 * channels, 3, 3)
        if side in (3, 7) and last in there and (channels, stem) != (64, "imagenet"):
            for arch in ("resnet18", "resnet34"):
                yield from _of_width(arch, channels, stem, given)
                if (channels, stem) == (64, "cifar") and is_of_solo_learn(nests):
                    yield from _of_width(f"solo:{arch}", channels, stem, given)
        for arch, width in fitting_cifar(channels, there) if side == 3 else ():
            yield from _of_width(arch, width, "cifar", given)
        if side == 3 and (channels, 1, 3, 3) in there:
            size = given.get("input_size")
            for stem in ("cifar", "imagenet"):  # both have it; they differ in strides
                if size is None or "stem" in given or (size <= SMALL_IMAGE) == (stem == "cifar"):
                    yield from _of_width("mobilenet_v2", 2 * channels, stem, given)


def _of_width(arch: str, width: int, stem: Stem, given: Mapping[str, Any]) -> Iterator[ModelInfo]:
    if given.get("width", width) != width or given.get("stem", "auto") not in ("auto", stem):
        return
    size = DEFAULT_INPUT_SIZE if stem == "cifar" else usual_size(f"torchvision:{arch}")
    if (arch, width, stem) == ("mobilenet_v2", 64, "imagenet"):
        arch = "torchvision:mobilenet_v2"
    yield from _described(arch, {"input_size": size, **given, "width": width, "stem": stem})


def _fitting(nests: Sequence[Nest], weights: str | Path, info: ModelInfo) -> list[Guess]:
    """The architecture, if the file fits it exactly."""
    try:
        found, report = fit(nests, _parts(info, weights), weights)
    except ODD:
        return []
    return [Guess(info, len(found.state))] if report.ok else []


def _of_network(
    nests: Sequence[Nest],
    weights: str | Path,
    network: Network,
    given: Mapping[str, Any],
    colours_known: bool,
) -> list[Guess]:
    """The architectures of equal tensors, if the file fits them."""
    every = [info for names in network.functions for n in names for info in _described(n, given)]
    infos = [info for info in every if is_published(info.arch)] or every
    functions: dict[int, list[ModelInfo]] = {}
    for info in sorted(infos, key=lambda info: _plainness(info.arch)):
        number = next(n for n, names in enumerate(network.functions) if info.arch in names)
        functions.setdefault(number, []).append(info)
    kinds: dict[tuple[Any, ...], Guess] = {}  # the plainest of each
    fitted: Guess | None = None
    for number, same in functions.items():
        made = is_made_for_a_size(same[0].arch)
        if made or fitted is None:
            fitted = _at_its_size(nests, weights, same[0])
        if fitted is None:
            continue
        sized = made and _shapes_of(_parts(fitted.info, weights)) != network.weights
        for info in _of_size(same, fitted.info.input_size, given) if sized else same:
            colours = None if colours_known else (info.mean, info.std)
            kind = (number, info.input_size, colours)
            kinds.setdefault(kind, Guess(info, fitted.tensors))
    found = sorted(kinds.values(), key=lambda each: _plainness(each.info.arch))
    plain = [each for each in found if each.info.arch.startswith("torchvision:")]
    others = tuple(each.info.arch for each in found if each not in plain)
    return [replace(each, others=others) for each in plain] or found


def _of_size(infos: Sequence[ModelInfo], size: int, given: Mapping[str, Any]) -> list[ModelInfo]:
    """Those published for a size, or all if none is, at the size that is given or else at it."""
    exact = [info for info in infos if usual_size(info.arch) == size] or infos
    return [replace(info, input_size=given.get("input_size", size)) for info in exact]


def _at_its_size(nests: Sequence[Nest], weights: str | Path, info: ModelInfo) -> Guess | None:
    """The architecture for images of the size that the file is for, if it fits one."""
    usual = usual_size(info.arch) or info.input_size
    tried = []
    for size in dict.fromkeys((info.input_size, usual)):
        at = replace(info, input_size=size)
        try:
            parts = _parts(at, weights)
            found, report = fit(nests, parts, weights)
        except ODD:
            continue
        if report.ok:
            return Guess(at, len(found.state))
        if is_made_for_a_size(info.arch) and not (report.missing or report.unexpected):
            tried = sizes(at, parts.backbone, found.state)
    for size in sorted(tried):
        if found_at := _fitting(nests, weights, replace(info, input_size=size)):
            return found_at[0]
    return None


def _plainness(arch: str) -> tuple[bool, int, str]:
    return not arch.startswith("torchvision:"), len(arch), arch
