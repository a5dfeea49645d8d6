"""Models in the layout of the file that they came from, for the code that loads that file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.backbones.foreign import Foreign, Source, listed, split_foreign
from bdclean.backbones.skeleton import shapes
from bdclean.backbones.split import SplitModel
from bdclean.errors import ConfigError, WeightsError, counted
from bdclean.files import FORMAT_KEY, SAFETENSORS
from bdclean.printable import printable
from bdclean.weights import TORCH_SUFFIXES, Nest, match, read_nests, write, write_torch
from bdclean.weights.match import shared_parts

_COUNTER = "num_batches_tracked"
_CHANNELS = 3

Keys = tuple[str | int, ...]
"""Keys of dicts and places in lists, from the top of a file."""


@dataclass(frozen=True)
class Layout:
    """A model by the names of a file.

    Attributes:
        keys: Those that lead to the dict of the network in the file.
        tensors: By the keys of the dict that holds them in the file, and by name. A classifier
            can lie in another dict than the backbone.
        metadata: What a file of ours says about its model; of a foreign file, what other
            libraries ask of safetensors.
        notes: Sentences: what of the file is left out, and what is not as it was.
    """

    keys: Keys
    tensors: dict[Keys, dict[str, Tensor]]
    metadata: dict[str, str]
    notes: tuple[str, ...]

    def flat(self) -> dict[str, Tensor]:
        """All tensors in one dict, by their names in the dict of the network."""
        return {
            f"{_beside(keys, self.keys)}{name}": tensor
            for keys, tensors in self.tensors.items()
            for name, tensor in tensors.items()
        }

    def nested(self) -> Any:
        """All tensors in dicts and lists under the keys of the file."""
        tree: dict[str | int, Any] = {}
        for keys, tensors in self.tensors.items():
            inner = tree
            for key in keys:
                inner = inner.setdefault(key, {})
            inner.update(tensors)
        return _with_lists(tree)


def written_back(weights: str | Path, model: SplitModel) -> Layout:
    """Puts a model into the layout of the file that it was loaded from.

    The network is found in the file as `load_model` finds it. Its tensors become those of the
    model, in the precision of the file; a number that has not changed keeps all its digits. What
    belongs to the architecture beside it stays; copies of the network, projections and what serves
    training alone are left out, and a note tells of them.

    Args:
        weights: The file.
        model: The model, changed since; it may be in any precision and on any device.

    Raises:
        WeightsError: If the file cannot be read safely, does not hold this network, or has a
            precision that cannot hold its numbers.
    """
    nests, metadata = read_nests(weights)
    if FORMAT_KEY in metadata:
        return Layout((), {(): model.state_dict()}, model.info.to_metadata(), ())
    found = _find(nests, model, weights)
    notes: list[str] = []
    sources = _sources_of_head(found, model, notes)
    written: dict[Keys, dict[str, Tensor]] = {found.nest.keys: {}}
    for ours, tensor in model.state_dict().items():
        places = sources.get(ours, ())
        olds = [place.tensor for place in places]
        for place, new in zip(places, _as_in_file(ours, tensor.detach().cpu(), olds), strict=True):
            here = written.setdefault(place.nest.keys, {})
            here[place.name] = _checked(ours, new, place, weights)
    for place, name, bias in _new_biases(model, sources):
        written[place.nest.keys][name] = bias
        notes.append(f"{printable(name)} is new: the classifier of the file had no bias.")
    network = written[found.nest.keys]
    network |= {kept.name: kept.tensor for kept in found.kept}
    network |= _under_other_names(found, sources, network)
    notes += [*_left_out(found, network), *_otherwise(sources, nests)]
    return Layout(found.nest.keys, written, {"format": "pt"}, tuple(notes))


def save_like(
    weights: str | Path, model: SplitModel, target: str | Path
) -> tuple[str, tuple[str, ...]]:
    """Writes a model so that code that loads one file loads this one too; see `written_back`.

    Args:
        weights: The file that the model was loaded from.
        model: The model, changed since.
        target: Where to. `.safetensors` is flat, with the names of the dict that held the network;
            `.pth` and the like (`bdclean.weights.TORCH_SUFFIXES`) keep the keys around it. Nothing
            but tensors, dicts and lists is written. Files of ours keep our own layout.

    Returns:
        The SHA-256 of the file's content in hexadecimal, and the notes of `written_back`, with
        what the ending changes.

    Raises:
        ConfigError: If the target is the file itself.
        WeightsError: As `written_back`, or if the target cannot be written.
    """
    target = Path(target)
    if target.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise WeightsError(
            f"{printable(target)}: weights are written to files that end in "
            f"{', '.join((SAFETENSORS, *TORCH_SUFFIXES))}; change the ending."
        )
    layout = written_back(weights, model)
    if target.exists() and target.samefile(weights):
        raise ConfigError(
            f"{printable(target)} is the file that the model came from; give another name."
        )
    notes = layout.notes
    if target.suffix != SAFETENSORS:
        if FORMAT_KEY in layout.metadata:
            notes = (*notes, f"Only {SAFETENSORS} files say which architecture they are for.")
        return write_torch(layout.nested(), target), notes
    if layout.keys:
        way = "".join(f"[{key!r}]" for key in layout.keys)
        notes = (
            *notes,
            f"{SAFETENSORS} files have no keys around a network: safetensors.torch.load_file "
            f"gives what torch.load(...){printable(way)} gave.",
        )
    return write(layout.flat(), target, layout.metadata), notes


def _find(nests: Sequence[Nest], model: SplitModel, weights: str | Path) -> Foreign:
    parts = shapes(model.info, printable(weights), model.num_features)
    found = split_foreign(nests, parts, weights)
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    report = match(backbone, {k: v for k, v in found.state.items() if not k.startswith("head.")})
    if not report.ok:
        raise WeightsError(
            f"{printable(weights)} does not hold the network that is to be written in its layout "
            f"({model.info.arch}): {report.message()}."
        )
    return found


def _sources_of_head(
    found: Foreign, model: SplitModel, notes: list[str]
) -> dict[str, tuple[Source, ...]]:
    """The places of all tensors of the model; without those of a head that has none."""
    head, had = model.head, "head.weight" in found.sources
    if head is None and had:
        notes.append("The classifier of the file is left out: the model has none.")
    elif head is not None and not (had and isinstance(head, nn.Linear)):
        kind = "linear" if isinstance(head, nn.Linear) else "of a linear probe"
        why = "the layers of the file cannot do what it does" if had else "the file has none"
        notes.append(
            f"The classifier of the model ({kind}) is left out: {why}; the model's own file has it."
        )
    elif isinstance(head, nn.Linear) and head.out_features != found.num_classes:
        notes.append(
            f"The classifier has {head.out_features} classes; that of the file had "
            f"{found.num_classes}."
        )
    if had and isinstance(head, nn.Linear):
        return found.sources
    return {k: v for k, v in found.sources.items() if not k.startswith("head.")}


def _as_in_file(ours: str, new: Tensor, olds: Sequence[Tensor]) -> list[Tensor]:
    """A tensor of the model in the shape and precision of those of the file that it came from."""
    if len(olds) < 2:
        return [_cast(new, old) for old in olds]
    if not ours.startswith("head."):  # in a row
        parts = torch.split(new, [len(old) for old in olds])
        return [_cast(part, old) for part, old in zip(parts, olds, strict=True)]
    if new.ndim > 1:  # averaged classifiers, whose features are in a row
        sizes = [old.flatten(1).shape[1] for old in olds]
        split = torch.split(new * len(olds), sizes, dim=1)
        return [_cast(part, old) for part, old in zip(split, olds, strict=True)]
    if len(new) != len(olds[0]):
        return [new.to(old.dtype) for old in olds]
    same = torch.stack(list(olds)).mean(0).to(new.dtype) == new
    return [torch.where(same, old, new.to(old.dtype)) for old in olds]


def _cast(new: Tensor, old: Tensor) -> Tensor:
    if new.numel() != old.numel():  # another number of classes
        return new.reshape(len(new), *old.shape[1:]).to(old.dtype)
    new = new.reshape(old.shape)
    return torch.where(old.to(new.dtype) == new, old, new.to(old.dtype))


def _checked(ours: str, new: Tensor, place: Source, weights: str | Path) -> Tensor:
    """The tensor, if the precision of the file holds its numbers."""
    if not new.is_floating_point() or bool(new.double().isfinite().all()):
        return new
    if ours.endswith(_COUNTER):  # evaluation does not use it
        return place.tensor
    raise WeightsError(
        f"{printable(weights)} holds {printable(place.name)} as "
        f"{_name(new.dtype)}, which cannot hold the numbers that the model has there; use the "
        "model's own file."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _new_biases(
    model: SplitModel, sources: Mapping[str, Sequence[Source]]
) -> Iterator[tuple[Source, str, Tensor]]:
    """The bias of a classifier that has none in the file, if not zero: where, name, values."""
    if "head.weight" not in sources or "head.bias" in sources:
        return
    bias = model.state_dict()["head.bias"].detach().cpu()
    for place in sources["head.weight"] if bool(bias.any()) else ():
        name = f"{place.name.removesuffix('weight')}bias"
        yield place, name, bias.to(place.tensor.dtype)


def _under_other_names(
    found: Foreign, sources: Mapping[str, Sequence[Source]], written: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same module under a second name, which shares its memory, gets the same tensors.

    A part of the file is one if all that it has is shared, but for numbers per channel.
    """
    here = [place for several in sources.values() for place in several if place.nest is found.nest]
    names = {_memory(place.tensor): place.name for place in here}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.nest.tensors.items():
        if name not in written:
            parts.setdefault(_part(name, found.prefix), {})[name] = tensor
    same: dict[str, Tensor] = {}
    for part in parts.values():
        shared = {k: names[_memory(v)] for k, v in part.items() if _memory(v) in names}
        if shared and all(k in shared or v.numel() <= _CHANNELS for k, v in part.items()):
            same |= {k: written[shared[k]] if k in shared else v for k, v in part.items()}
    return same


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    where = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *where, tensor.dtype, tensor.shape, tensor.stride()


def _part(name: str, prefix: str) -> str:
    """The first part of a name beside those of the network."""
    return name[len(shared_parts(name, prefix)) :].split(".")[0]


def _left_out(found: Foreign, written: Mapping[str, Tensor]) -> Iterator[str]:
    """What of the file is not written, or as it was."""
    network = {place.name for several in found.sources.values() for place in several}
    left = [name for name in found.nest.tensors if name not in written and name not in network]
    for copy in found.copies:
        prefix = copy.place.prefix
        if copy.nest.keys != found.nest.keys or any(name.startswith(prefix) for name in left):
            yield (
                f"The copy of the network in {copy.name} is left out: it has not been changed, so "
                "a backdoor would still be in it."
            )
    if left:
        parts = listed(_part(name, found.prefix) for name in left)
        yield f"Left out: {counted(len(left), 'tensor')} under {parts}, no part of the network."
    if found.nest.keys:
        yield (
            f"Left out: what the file holds beside {printable(found.nest.where)}, such as an "
            "optimizer, settings and numbers."
        )
    if found.kept:
        names = listed(place.name for place in found.kept)
        yield f"{names}: as in the file, because the network does not use them."


def _otherwise(sources: Mapping[str, Sequence[Source]], nests: Sequence[Nest]) -> Iterator[str]:
    """What has another form than in the file, or was fitted to its form."""
    in_file = {nest.keys: nest.tensors for nest in nests}
    places = [place for several in sources.values() for place in several]
    factors = [place.name for place in places if place.name not in in_file[place.nest.keys]]
    if factors:
        yield (
            f"The layers of {listed(factors)} take plain weights, without the pruning, weight "
            "norm or spectral norm that they have in the file."
        )
    heads = sources.get("head.weight", ())
    if len(heads) > 1:
        names = listed(place.name.removesuffix(".weight") for place in heads)
        yield f"Their average is the classifier of the model: {names}."
    if any(place.tensor.ndim > 2 for place in heads):
        yield f"A convolution, as in the file: {listed(place.name for place in heads)}."
    kinds = {place.tensor.dtype for place in places if place.tensor.is_floating_point()}
    if rounded := [_name(kind) for kind in kinds if kind.itemsize < torch.float32.itemsize]:
        yield f"Computed in float32 and rounded to the precision of the file: {listed(rounded)}."


def _beside(keys: Keys, network: Keys) -> str:
    """What names of a dict begin with, beside those of the network."""
    if keys in (network, network[:-1]):
        return ""
    return f"{keys[-1]}."


def _with_lists(tree: Any) -> Any:
    """Dicts whose keys are places become lists, which are empty elsewhere."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: _with_lists(value) for key, value in tree.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [inner.get(place, {}) for place in range(max(inner) + 1)]
    return inner
