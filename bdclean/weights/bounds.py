"""Bounds of a weights file, checked before it is read: what it claims must be there.

A few kilobytes can ask for all memory, or for hours: by sizes that are not there, by zip entries
that inflate, by a million names, by a hole of the disk. What is looked at here are the size of
the file, the directory of a zip archive, and the instructions of a pickle.
"""

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, BinaryIO

from bdclean.errors import ConfigError, WeightsError
from bdclean.printable import printable
from bdclean.weights.pickles import (
    MOST_PICKLES,
    AsksForError,
    DamagedError,
    Machine,
    RefusedError,
    TooMuchError,
    is_list_of_text,
)

VARIABLE = "BDCLEAN_MAX_WEIGHTS_GB"
"""The environment variable that raises all bounds together."""
_USUAL_GB = 2.0
# For each of these gigabytes; the largest image models have 2,000 tensors.
_TENSORS, _INSTRUCTIONS, _TEXT = 10_000, 1_000_000, 2 << 20
LONGEST_NAME = 500  # characters; the longest of torchvision and timm has 90
_DEEPEST = 20  # state dicts in dictionaries
_ZIP, _END, _END_64, _FIND_64 = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


def limit() -> float:
    """Gigabytes (10 ** 9 bytes) of the largest weights file that is read.

    Raises:
        ConfigError: If the environment variable is no number above 0.
    """
    given = os.environ.get(VARIABLE)
    try:
        value = _USUAL_GB if not given else float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{VARIABLE}={printable(given)}: it must be a number above 0.")
    return value


def check_size(path: Path, name: str) -> None:
    """Refuses a file that is larger than the limit.

    Args:
        path: The file.
        name: What the user calls it, as in all functions here.

    Raises:
        WeightsError: If it is.
    """
    size = path.stat().st_size
    if size > limit() * 1e9:
        raise too_much(name, f"has {size / 1e9:,.1f} GB")


def too_much(name: str, what: str) -> WeightsError:
    """What to say of a file that has more of something than the limit allows."""
    return WeightsError(
        f"{name} {what}, more than is read of an untrusted file; if it is right, set the "
        f"environment variable {VARIABLE} above {limit():g}."
    )


def check_header(path: Path, name: str) -> None:
    """Refuses a safetensors file with a header that would take minutes to read.

    Raises:
        WeightsError: If it has one.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if most_text() < size <= path.stat().st_size:
        raise too_much(name, f"has a header of {size:,} bytes")


def check_names(names: Iterable[str], name: str) -> None:
    """Refuses tensors that are too many, or have endless names.

    Raises:
        WeightsError: If one or all are.
    """
    names = list(names)
    if len(names) > _TENSORS * limit():
        raise too_much(name, f"has {len(names):,} tensors")
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise WeightsError(
            f"{name} has a tensor whose name has {len(longest):,} characters, more than "
            f"{LONGEST_NAME}: {printable(longest[:50])}..."
        )


def check_nests(content: Any, name: str) -> None:
    """Refuses dictionaries that hold themselves, or others endlessly deep.

    Raises:
        WeightsError: If there are such.
    """
    inside: dict[int, list[int]] = {}
    ahead = [content] if isinstance(content, Mapping) else []
    while ahead:
        mapping = ahead.pop()
        if id(mapping) not in inside:
            nested = [value for value in mapping.values() if isinstance(value, Mapping)]
            inside[id(mapping)] = [id(each) for each in nested]
            ahead += nested
    try:
        order = list(TopologicalSorter(inside).static_order())
    except CycleError as error:
        raise WeightsError(f"{name} has a dictionary that holds itself.") from error
    depths: dict[int, int] = {}
    for each in order:
        depths[each] = 1 + max((depths[one] for one in inside[each]), default=0)
    if max(depths.values(), default=0) > _DEEPEST:
        raise WeightsError(f"{name} has dictionaries in dictionaries, more than {_DEEPEST} deep.")


def pickles_in(path: Path) -> list[bytes]:
    """The pickles of a zip archive of torch, as they are.

    Raises:
        RefusedError: If the archive is none that torch writes.
        struct.error, OverflowError: If it is damaged.
    """
    with path.open("rb") as file:
        entries = _entries(file, path.stat().st_size)
        pickles = [each for each in entries if each.filename.lower().endswith(".pkl")]
        return [_content(file, each) for each in pickles[:MOST_PICKLES]]


def most_text() -> int:
    """Bytes of the longest header or pickle that is read."""
    return int(_TEXT * limit())


def is_zip(path: Path) -> bool:
    """Whether a file of torch is a zip archive, as they are since torch 1.6."""
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def check_torch_file(path: Path, name: str, *, is_ours: bool = False) -> None:
    """Refuses a file of torch that claims what it does not have, or asks for endless work.

    A file that is merely damaged passes: torch says what is wrong with it.

    Args:
        path: The file.
        name: What the user calls it.
        is_ours: Whether it is a checkpoint of a run, of which we know that it is a zip archive.

    Raises:
        WeightsError: If it is to be refused.
        OSError: If it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            _look(file, path.stat().st_size, is_ours=is_ours)
    except (struct.error, OverflowError) as error:  # places that are not in the file
        raise WeightsError(damaged(name, error, is_ours=is_ours)) from error
    except AsksForError as error:
        raise WeightsError(asks_for(name, str(error), is_ours=is_ours)) from error
    except DamagedError as error:
        raise WeightsError(damaged(name, error, is_ours=is_ours)) from error
    except TooMuchError as error:
        raise too_much(name, str(error)) from error
    except RefusedError as error:
        raise WeightsError(f"{name} {printable(error)}.") from error


def _look(file: BinaryIO, size: int, *, is_ours: bool) -> None:
    machine = Machine(int(_INSTRUCTIONS * limit()), size)
    begin = file.read(len(_ZIP))
    file.seek(0)
    if begin == _ZIP:
        _check_zip(machine, file, size)
        return
    if size == 0 or is_ours:
        raise DamagedError("it is no zip archive" if size else "it is empty")
    if size > limit() * 1e9 / 2:  # it is read into memory whole
        raise TooMuchError(f"is no zip archive and has {size / 1e9:,.1f} GB")
    followed = _follow(machine, io.BytesIO(file.read(most_text())), MOST_PICKLES)
    if not followed and size > most_text():
        raise TooMuchError(f"has a pickle of more than {most_text():,} bytes, or none")


def asks_for(name: str, wanted: str, *, is_ours: bool = False) -> str:
    """What to say of a pickle that asks for a function or class."""
    asks = f"asks for the Python object {printable(wanted)[:200]!r}"
    if is_ours:
        return f"{name} is not a readable checkpoint: it {asks}, and no run keeps one."
    return (
        f"{name} {asks} while loading. A pickle can run any code that way, so it is refused. Ask "
        "its author for a .safetensors file or a plain state dict, or convert it in a sandbox that "
        "you can throw away."
    )


def damaged(name: str, why: object, *, is_ours: bool = False) -> str:
    """What to say of a file that torch cannot read, or would not write.

    Only the first sentence of the reason: torch goes on with advice to switch the safe loading off.
    """
    kind = (
        "is not a readable checkpoint" if is_ours else "is damaged or was not written by torch.save"
    )
    return f"{name} {kind} ({first_sentence(why)})."


def first_sentence(error: object) -> str:
    """Of what a library says; of others comes advice to switch the safe loading off."""
    first = re.split(r"\.\s|\n", str(error).strip())[0][:200]
    return printable(first) or type(error).__name__


def refused(name: str, reason: str, *, is_ours: bool = False) -> str:
    """What to say of a pickle that torch's restricted unpickler refuses."""
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    if found is not None:
        return asks_for(name, found[1], is_ours=is_ours)
    detail = first_sentence(reason.partition("WeightsUnpickler error:")[2] or reason)
    if is_ours:
        return damaged(name, detail, is_ours=True)
    return (
        f"{name} is damaged or holds more than tensors, and nothing in it is executed ({detail})."
    )


def _follow(machine: Machine, pickles: io.BytesIO, count: int) -> bool:
    """Whether so many pickles are whole; torch refuses those that are not."""
    made: Any = None
    try:
        for _ in range(count):
            made = machine.follow(pickles)
    except (ValueError, LookupError, RecursionError):
        return False
    if count > 1 and not is_list_of_text(made):
        raise DamagedError("it lists no storages")
    return True


def _check_zip(machine: Machine, file: BinaryIO, size: int) -> None:
    """Follows the pickle in a zip archive as torch writes it."""
    entries = _entries(file, size)
    pickles = [each for each in entries if each.filename.lower().endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedError(f"it has {len(pickles)} pickles")
    _follow(machine, io.BytesIO(_content(file, pickles[0])), 1)
    place = pickles[0].filename.removesuffix("data.pkl")
    there = {each.filename: each.file_size for each in entries}
    for key, claimed in machine.storages.items():
        if claimed > there.get(f"{place}data/{key}", 0):
            raise DamagedError(f"its storage {key[:20]} is missing or cut short")


def _entries(file: BinaryIO, size: int) -> list[zipfile.ZipInfo]:
    begin, length = _directory(file, size)
    if length > most_text():
        raise TooMuchError(f"has a zip directory of {length:,} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            entries, found = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DamagedError(str(error)) from error
    if found != begin:
        raise DamagedError("its zip directory is elsewhere than it says")
    if any(each.filename.endswith("/constants.pkl") for each in entries):
        raise RefusedError(
            "is a TorchScript archive, which is a program; ask its author for a .safetensors file "
            "or a plain state dict"
        )
    if any(each.compress_type or each.compress_size != each.file_size for each in entries):
        raise RefusedError(
            "is a zip archive with compressed entries, as torch.save never writes them"
        )
    claimed = sum(each.file_size for each in entries)
    if claimed > size:
        raise RefusedError(f"is a zip archive of {size:,} bytes whose entries claim {claimed:,}")
    return entries


def _content(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    """Of an entry; torch does not compare checksums, and may have written none."""
    if entry.file_size > most_text():
        raise TooMuchError(f"has a pickle of {entry.file_size:,} bytes")
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<2H", file.read(4))), os.SEEK_CUR)
    return file.read(entry.file_size)


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the directory of a zip archive begins, and its length.

    Readers of zip archives disagree on odd ones, so the directory must stand where torch writes
    it: at the end, without a comment.
    """
    file.seek(max(0, size - 98))
    tail = file.read(98).rjust(98, b"\0")
    if tail[76:80] != _END or tail[96:] != b"\0\0":
        raise DamagedError("its zip directory is not at its end")
    length, begin = struct.unpack("<2L", tail[88:96])
    end = size - 22
    if tail[56:60] == _FIND_64:
        end = size - 98
        if struct.unpack("<Q", tail[64:72])[0] != end or tail[:4] != _END_64:
            raise DamagedError("its zip directory is elsewhere than it says")
        length, begin = struct.unpack("<2Q", tail[40:56])
    if begin + length != end:
        raise DamagedError("its zip directory is elsewhere than it says")
    return begin, length
