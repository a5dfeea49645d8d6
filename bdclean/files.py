"""Files that are whole or absent, and hashes of what is in them."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bdclean.errors import FileError
from bdclean.locks import require_held

if TYPE_CHECKING:  # no command has to load torch to write a text
    from torch import Tensor

SAFETENSORS = ".safetensors"
FORMAT_KEY = "bdclean_format"
"""Is in the metadata of weights files of ours, which name their network."""
_LARGEST_HEADER = 16 << 20  # bytes; those of the largest models have one hundredth of it


_LEFT = re.compile(r"\..+\.([0-9a-f]{8}\.tmp|ckpt\.\d+)")


@contextmanager
def replacing(path: str | os.PathLike[str], size: int | None = None) -> Iterator[Path]:
    """Writes a file whole or not at all; missing folders are made.

    The block writes to the path that it is given, which lies in the same folder, because a rename
    is atomic only within one file system. When the block ends, the file gets its name and replaces
    one that has it. When the block raises, nothing is left.

    Args:
        path: The file to write.
        size: Bytes that it will have, if they are known: what is said of a full disk.

    Yields:
        An empty file to write to.

    Raises:
        FileError: If the file cannot be written: its folder is protected, the disk is full ...
        ConfigError: If it lies in a run folder whose lock this process has lost.
    """
    path = Path(path)
    require_held(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.open("xb").close()  # with the permissions that a new file gets
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # else a crash may leave a name without its content
            require_held(path)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        room = _room(path.parent, size) if error.errno == errno.ENOSPC else ""
        raise FileError(f"{path} cannot be written: {error.strerror or error}.{room}") from error


def _room(folder: Path, size: int | None) -> str:
    """How much a full disk still takes, when what was written in vain is gone."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    needs = "" if size is None else f"it has {size:,} bytes, and "
    told = f"{needs}{free:,} bytes are free there."
    return f" {told[0].upper()}{told[1:]}"


def leftovers(folder: Path) -> list[Path]:
    """What killed processes have left in a folder of `replacing`, here and in earlier versions."""
    found = folder.glob(".*") if folder.is_dir() else ()
    return [path for path in found if _LEFT.fullmatch(path.name) and path.is_file()]


def sweep(folder: Path) -> None:
    """Removes the `leftovers`; nobody may be writing into the folder."""
    for path in leftovers(folder):
        with suppress(OSError):  # they are in nobody's way
            path.unlink()


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; see `replacing`.

    Raises:
        FileError: If it cannot be written.
    """
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8 whole or not at all; see `replacing`.

    Names of files need not be UTF-8; what Python read of them is written back as it was.

    Raises:
        FileError: If it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; empty for a file of another kind.

    Raises:
        OSError: If it cannot be read.
    """
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            metadata = json.loads(file.read(min(size, _LARGEST_HEADER)))["__metadata__"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
    return metadata if isinstance(metadata, dict) else {}


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: If it cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensor(tensor: "Tensor") -> str:
    """SHA-256 of a tensor's type, shape and values, in hexadecimal.

    Args:
        tensor: On the CPU, of a type that numpy knows.
    """
    shape = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(shape + tensor.contiguous().numpy().tobytes()).hexdigest()
