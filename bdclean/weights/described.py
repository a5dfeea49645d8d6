"""What a weights file is, told without loading it: its kind, its hash, what its pickle names."""

import hashlib
import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bdclean.errors import WeightsError
from bdclean.printable import printable
from bdclean.weights import bounds
from bdclean.weights.format import check_place
from bdclean.weights.harmless import NAMES
from bdclean.weights.kinds import kind_of
from bdclean.weights.pickles import MOST_PICKLES, RefusedError

_INSTRUCTIONS = 1_000_000  # of pickles that are looked at
_OBJECTS = 50  # that are listed
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
# What pickles of tensors name. torch's restricted unpickler knows all of them.
_OF_TENSORS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.(?:Size|device)"
    r"|torch\.(?:storage\.)?\w*Storage|torch\.\w+\d+|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|collections\.(?:OrderedDict|Counter)|_codecs\.encode|\w+\.set"
)


@dataclass(frozen=True)
class FileFacts:
    """A file, from outside.

    Attributes:
        kind: What it is, in words.
        size: Bytes.
        sha256: Of its content, in hexadecimal; None if it is too large to be read.
        objects: Functions and classes that its pickle names beside those of tensors; where it is
            loaded without care, these are imported and may be called. The first 50.
    """

    kind: str
    size: int
    sha256: str | None
    objects: tuple[str, ...] = ()


def describe(path: str | Path) -> FileFacts:
    """Looks at a file, of whatever kind. Nothing in it is executed, and no tensor is read.

    Raises:
        WeightsError: If there is no such file, or it cannot be opened.
    """
    path = Path(path)
    check_place(path)
    try:
        size = path.stat().st_size
        sha256 = None
        if size <= bounds.limit() * 1e9:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        kind, is_torch = _kind(path)
        objects = tuple(islice(_objects(path), _OBJECTS)) if is_torch else ()
    except OSError as error:
        raise WeightsError(
            f"{printable(path)} cannot be read: {error.strerror or error}."
        ) from error
    return FileFacts(kind, size, sha256, objects)


def _kind(path: Path) -> tuple[str, bool]:
    """The kind of a file in words, and whether it is one of torch."""
    try:
        if kind_of(path) == "safetensors":
            return "safetensors", False
    except WeightsError as error:
        said = re.search(r" is (an? [^;]+|not? [^;]+|NumPy arrays);", str(error))
        return (said[1] if said is not None else "no weights file"), False
    if bounds.is_zip(path):
        return "zip archive of torch.save", True
    return "file of torch.save of before torch 1.6 (pickles without an archive)", True


def _objects(path: Path) -> Iterator[str]:
    """Names in the pickles of a file, each once, but for those of tensors."""
    seen: set[str] = set()
    for pickle in _pickles(path):
        for name in _names(pickle):
            if name not in seen and name not in NAMES and not _OF_TENSORS.fullmatch(name):
                yield printable(name)[: bounds.LONGEST_NAME]
            seen.add(name)


def _pickles(path: Path) -> list[io.BytesIO]:
    """The pickles of a file of torch, as far as they can be found."""
    if not bounds.is_zip(path):
        with path.open("rb") as file:
            return [io.BytesIO(file.read(bounds.most_text()))]
    try:
        return [io.BytesIO(content) for content in bounds.pickles_in(path)]
    except (RefusedError, struct.error, OverflowError, zipfile.BadZipFile):
        return []


def _names(pickles: io.BytesIO) -> Iterator[str]:
    """`module.name` of all that pickles in a row ask for, until their end or to damaged bytes."""
    memo: dict[int, str] = {}
    texts: list[str] = []  # as they are put on the stack
    puts, last = 0, ""
    try:
        for _ in range(MOST_PICKLES):
            for code, argument, _ in islice(pickletools.genops(pickles), _INSTRUCTIONS):
                text = str(argument) if code.name in _TEXTS else ""
                if code.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".", 1)
                elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                    yield ".".join(texts[-2:])
                elif code.name == "MEMOIZE":
                    memo[puts] = last
                    puts += 1
                elif code.name.endswith("BINPUT"):
                    memo[int(str(argument))] = last
                elif code.name.endswith("BINGET"):
                    text = memo.get(int(str(argument)), "")
                if text:
                    texts = [*texts[-1:], text]
                last = text
    except (ValueError, LookupError, RecursionError):
        return
