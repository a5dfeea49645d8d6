"""Weights files: safetensors in and out, foreign checkpoints in.

The only place that opens a weights file. Nothing in a file is ever executed: pickles are read
with torch's restricted unpickler alone, and what it refuses is refused here. What a file claims is
compared with what it has before it is read, see `bdclean.weights.bounds`.
"""

import hashlib
import io
import json
import mmap
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bdclean.errors import FileError, WeightsError, counted
from bdclean.files import SAFETENSORS, write_bytes
from bdclean.printable import printable
from bdclean.weights import bounds
from bdclean.weights.harmless import HARMLESS
from bdclean.weights.kinds import kind_of, refuse_arrays, refuse_model
from bdclean.weights.nests import Nest, find_nests, name_of

_RECORD, _MODEL = "bdclean", "model"  # what our modules keep in checkpoints, and of which network
_STATE = "state_dict"  # where Lightning keeps tensors


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a weights file without executing anything in it.

    Args:
        path: A safetensors file, or one that `torch.save` wrote, whatever its name. Of several
            state dicts in it the largest is taken; of a checkpoint of ours, the model in it.

    Returns:
        Tensors by name, on the CPU, and the file's metadata (empty for foreign torch files).

    Raises:
        WeightsError: If the file is missing, of another kind, damaged, empty, needs code, or is
            larger than the limit, see `bdclean.weights.bounds`.
    """
    nests, metadata = read_nests(path)
    nest = max(nests, key=lambda each: len(each.tensors))  # the first of equals
    check_plain(nest, path)
    return nest.tensors, metadata


def read_nests(path: str | Path) -> tuple[list[Nest], dict[str, str]]:
    """All state dicts of a weights file, and its metadata; see `read`.

    Raises:
        WeightsError: As `read`, but for entries that are no plain tensors.
    """
    if not str(path):
        raise WeightsError("weights='': give the path of a weights file.")
    if re.match(r"[a-z]+[a-z0-9+]*://", str(path), re.I):  # a Path would lose a slash of it
        raise WeightsError(
            f"{printable(path)}: nothing is downloaded; fetch that file and give its path."
        )
    path = Path(path)
    check_place(path)
    try:
        bounds.check_size(path, printable(path))
        if kind_of(path) == "safetensors":
            state, metadata = _read_safetensors(path)
            nests = find_nests(state)
        else:
            nests, metadata = _networks_of(_read_torch(path), path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not nests:
        raise WeightsError(f"{path} holds no tensors.")
    bounds.check_names([name for nest in nests for name in nest.tensors], printable(path))
    return nests, metadata


def check_plain(nest: Nest, path: str | Path) -> None:
    """Refuses a state dict that holds more than plain tensors.

    Raises:
        WeightsError: With the first few names.
    """
    if nest.others:
        raise _not_plain(path, nest.others)


def check_place(path: Path) -> None:
    """Refuses what is no file of a disk."""
    if os.path.isdir(path):  # noqa: PTH112  (of any length)
        raise WeightsError(f"{printable(path)} is a folder; give the weights file in it.")
    if os.path.isfile(path):  # noqa: PTH113
        return
    if os.path.exists(path):  # noqa: PTH110
        raise WeightsError(
            f"{printable(path)} is a device, a pipe or a socket; give a file on a disk."
        )
    raise WeightsError(f"{printable(path)}: there is no such weights file.")


def write(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> str:
    """Writes a `.safetensors` file in one step: it is there whole, or not at all.

    Args:
        state: Tensors by name, on any device.
        path: Where to; missing folders are made.
        metadata: Text that goes into the header.

    Returns:
        The SHA-256 of the file's content, in hexadecimal.

    Raises:
        WeightsError: If `path` does not end in `.safetensors` or cannot be written, or without
            tensors.
    """
    path = Path(path)
    if path.suffix != SAFETENSORS:
        raise WeightsError(f"{path}: weights are written as {SAFETENSORS}; change the ending.")
    if not state:
        raise WeightsError(f"{path}: there are no tensors to write.")
    # Clones: safetensors refuses tensors that share storage or are not contiguous.
    tensors = {name: _alone(tensor) for name, tensor in state.items()}
    content = _sorted_header(save(tensors, dict(metadata)))
    try:
        write_bytes(path, content)
    except FileError as error:
        raise WeightsError(str(error)) from error
    return hashlib.sha256(content).hexdigest()


def write_torch(content: Any, path: str | Path) -> str:
    """Writes what `torch.load` reads, in one step: it is there whole, or not at all.

    Args:
        content: Dicts by text and lists, with tensors in them, on any device.
        path: Where to; missing folders are made.

    Returns:
        The SHA-256 of the file's content, in hexadecimal.

    Raises:
        WeightsError: If `path` cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(_plain(content), buffer)
    written = buffer.getvalue()
    try:
        write_bytes(path, written)
    except FileError as error:
        raise WeightsError(str(error)) from error
    return hashlib.sha256(written).hexdigest()


def _plain(content: Any) -> Any:
    """The same, with tensors that share no storage."""
    if isinstance(content, Tensor):
        return _alone(content)
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content]


def _alone(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _sorted_header(content: bytes) -> bytes:
    # safetensors writes the metadata in random order; sorted, equal weights have equal hashes.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    bounds.check_header(path, printable(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            bounds.check_names(names, printable(path))
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        told = bounds.first_sentence(error)
        raise WeightsError(f"{path} is not a readable safetensors file ({told}).") from error


def _read_torch(path: Path) -> Any:
    refuse_model(path)
    refuse_arrays(path, bounds.most_text())
    bounds.check_torch_file(path, printable(path))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*HARMLESS]):
            warnings.simplefilter("ignore")  # torch's hints on the pickle; refusals say it below
            content = _load(path)
    except pickle.UnpicklingError as error:
        raise WeightsError(bounds.refused(str(path), str(error))) from error
    except Exception as error:  # damaged bytes can end anywhere in torch's unpickler
        raise WeightsError(bounds.damaged(str(path), error)) from error
    bounds.check_nests(content, printable(path))
    return content


def _load(path: Path) -> Any:
    """What torch reads. Tensors stay on the disk until they are used, where the file allows it."""
    if bounds.is_zip(path) and path.suffix != SAFETENSORS:  # which torch would believe
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # Not by its path: torch would try it as an archive of tar first, which has no bounds.
        opened: Any = mapped
        return torch.load(opened, map_location="cpu", weights_only=True)


def _networks_of(content: Any, path: Path) -> tuple[list[Nest], dict[str, str]]:
    """The state dicts of a torch file; of a checkpoint of ours, the model and what describes it."""
    nests = find_nests(content)
    if not nests:
        raise _without_tensors(content, path)
    if not isinstance(content, Mapping) or _RECORD not in content:
        return nests, {}
    record = content[_RECORD]
    networks = record.get("networks") if isinstance(record, Mapping) else None
    described = networks.get(_MODEL) if isinstance(networks, Mapping) else None
    if not isinstance(described, Mapping) or not _is_text(described):
        raise WeightsError(f"{path}: its entry {_RECORD!r} does not describe a model.")
    _tell_of_unfinished(record, path)
    prefix = f"{_MODEL}."
    states = [nest for nest in nests if nest.where == _STATE]
    for nest in states:
        check_plain(nest, path)
    own = {
        name.removeprefix(prefix): tensor
        for nest in states
        for name, tensor in nest.tensors.items()
        if name.startswith(prefix)
    }
    if not own:
        raise WeightsError(f"{path} holds no tensors of its network {_MODEL!r}.")
    return [Nest("", own)], dict(described)


def _without_tensors(content: Any, path: Path) -> WeightsError:
    """What is said of a file in which no dict holds a tensor."""
    if not isinstance(content, Mapping):
        return WeightsError(f"{path} holds a {type(content).__name__}, not a state dict.")
    others = [name_of(key) for key, value in content.items() if not isinstance(value, Mapping)]
    if others:
        return _not_plain(path, others)
    return WeightsError(f"{path} holds no tensors.")


def _not_plain(path: str | Path, names: Sequence[str]) -> WeightsError:
    return WeightsError(
        f"{path} is not a state dict: {_odd(len(names))} ({', '.join(map(printable, names[:5]))})."
    )


def _odd(count: int) -> str:
    return counted(count, "entry is no plain tensor", "entries are no plain tensors")


def _tell_of_unfinished(record: Mapping[str, Any], path: Path) -> None:
    """Says which network is taken from a checkpoint of a run whose stages were not all done."""
    plan, stage = record.get("plan"), record.get("stage")
    if not isinstance(plan, list | tuple) or not isinstance(stage, int):
        return
    if 0 <= stage < len(plan) and isinstance(plan[stage], list | tuple) and plan[stage]:
        warnings.warn(
            printable(
                f"{path} is a checkpoint of an unfinished run of {record.get('method')}: its "
                f"network {_MODEL!r} is taken as it was in the stage {plan[stage][0]}, number "
                f"{stage + 1} of {len(plan)}."
            ),
            stacklevel=2,
        )


def _is_text(metadata: Mapping[Any, Any]) -> bool:
    return all(isinstance(part, str) for pair in metadata.items() for part in pair)
