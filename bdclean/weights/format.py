"""Weights files: safetensors in and out, foreign checkpoints in.

The only place that opens a weights file. Nothing in a file is ever executed: pickles are read
with torch's restricted unpickler alone, and what it refuses is refused here. What a file claims is
compared with what it has before it is read, see `bdclean.weights.bounds`.
"""

import hashlib
import json
import mmap
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bdclean.errors import FileError, WeightsError
from bdclean.files import SAFETENSORS, write_bytes
from bdclean.printable import printable
from bdclean.weights import bounds

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_RECORD, _MODEL = "bdclean", "model"  # what our modules keep in checkpoints, and of which network
_NESTS = ("state_dict", "model_state_dict", "model", "net")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a weights file without executing anything in it.

    Args:
        path: `.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin`, `.pth.tar` written by
            `torch.save`. A state dict nested under "state_dict", "model_state_dict", "model" or
            "net" is found; of a checkpoint of ours, the model in it.

    Returns:
        Tensors by name, on the CPU, and the file's metadata (empty for foreign torch files).

    Raises:
        WeightsError: If the file is missing, of another kind, damaged, empty, needs code, or is
            larger than the limit, see `bdclean.weights.bounds`.
    """
    if not str(path):
        raise WeightsError("weights='': give the path of a weights file.")
    if re.match(r"[a-z]+[a-z0-9+]*://", str(path), re.I):  # a Path would lose a slash of it
        raise WeightsError(
            f"{printable(path)}: nothing is downloaded; fetch that file and give its path."
        )
    path = Path(path)
    _check_place(path)
    try:
        bounds.check_size(path, printable(path))
        if path.suffix == SAFETENSORS:
            state, metadata = _read_safetensors(path)
        elif path.suffix in TORCH_SUFFIXES:
            state, metadata = _network_of(_read_torch(path), path)
        else:
            allowed = ", ".join((SAFETENSORS, *TORCH_SUFFIXES))
            raise WeightsError(f"{path}: weights files end in {allowed}.")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not state:
        raise WeightsError(f"{path} holds no tensors.")
    bounds.check_names(state, printable(path))
    return state, metadata


def _check_place(path: Path) -> None:
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
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    content = _sorted_header(save(tensors, dict(metadata)))
    try:
        write_bytes(path, content)
    except FileError as error:
        raise WeightsError(str(error)) from error
    return hashlib.sha256(content).hexdigest()


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
    bounds.check_torch_file(path, printable(path))
    try:
        with warnings.catch_warnings():
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
    if bounds.is_zip(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # Not by its path: torch would try it as an archive of tar first, which has no bounds.
        opened: Any = mapped
        return torch.load(opened, map_location="cpu", weights_only=True)


def _is_plain(value: object) -> bool:
    """Whether it is a tensor of numbers, without attributes that hide its methods."""
    if type(value) not in (Tensor, nn.Parameter) or vars(value):
        return False
    assert isinstance(value, Tensor)  # noqa: S101
    odd = value.is_nested or value.is_quantized or value.is_meta
    return not odd and value.layout == torch.strided


def _network_of(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict of a torch file; of a checkpoint of ours, the model and what describes it."""
    state = _state_dict(content, path)
    if not isinstance(content, Mapping) or _RECORD not in content:
        return state, {}
    record = content[_RECORD]
    networks = record.get("networks") if isinstance(record, Mapping) else None
    described = networks.get(_MODEL) if isinstance(networks, Mapping) else None
    if not isinstance(described, Mapping) or not _is_text(described):
        raise WeightsError(f"{path}: its entry {_RECORD!r} does not describe a model.")
    _tell_of_unfinished(record, path)
    prefix = f"{_MODEL}."
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}, dict(described)


def _tell_of_unfinished(record: Mapping[str, Any], path: Path) -> None:
    """Says which network is taken from a checkpoint of a run whose stages were not all done."""
    plan, stage = record.get("plan"), record.get("stage")
    if not isinstance(plan, list | tuple) or not isinstance(stage, int):
        return
    if 0 <= stage < len(plan) and isinstance(plan[stage], list | tuple) and plan[stage]:
        warnings.warn(
            f"{path} is a checkpoint of an unfinished run of {record.get('method')}: its network "
            f"{_MODEL!r} is taken as it was in the stage {plan[stage][0]}, number {stage + 1} of "
            f"{len(plan)}.",
            stacklevel=2,
        )


def _is_text(metadata: Mapping[Any, Any]) -> bool:
    return all(isinstance(part, str) for pair in metadata.items() for part in pair)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nests = [key for key in _NESTS if isinstance(content.get(key), Mapping)]
        if not nests:
            break
        content = content[nests[0]]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict.")
    others = [str(key) for key, value in content.items() if not _is_plain(value)]
    if others:
        raise WeightsError(
            f"{path} is not a state dict: {len(others)} entries are no plain tensors "
            f"({', '.join(map(printable, others[:5]))})."
        )
    return {str(key): value for key, value in content.items()}
