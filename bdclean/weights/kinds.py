"""What a file is, by its first bytes: the name of a weights file says nothing about its format."""

import codecs
import io
import pickletools
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal

from bdclean.errors import WeightsError
from bdclean.files import SAFETENSORS
from bdclean.printable import printable

Kind = Literal["safetensors", "torch"]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pkl", ".pickle", ".th", ".pyth")
_HEAD = 512  # bytes that are looked at; the name of a tar archive's format is at 257
_MODEL_SCAN = 1 << 20  # bytes in which a pickled model names its first layer
_LAYER = re.compile(rb"c(torch\.nn\.modules\.[\w.]{1,80})\n(\w{1,80})\n")
# How the pickle of an array begins, as `GLOBAL` of older protocols and as text of newer ones.
_ARRAY = re.compile(rb"numpy\._?core\.(multiarray|numeric)[^a-z]{1,4}(_reconstruct|_frombuffer)")
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_INSTRUCTIONS = 1000  # of a pickle that are looked at
_MAKES = {"REDUCE", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}  # instructions that call something
_WORDS = 40  # characters of a text that are quoted
_UNPACK = "unpack it and give the weights file in it"
_CONVERT = "convert it to a PyTorch state dict where its library is at hand"
_FETCH = "download the file itself"
_AGAIN = "download it again, or give the weights file"
# (how it begins, what it is, what to do)
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file: it holds only the address of the weights",
        f"run git lfs pull, or {_FETCH}",
    ),
    (b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"\x89HDF\r\n", "an HDF5 file (Keras and others)", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"GGUF", "a GGUF file", _CONVERT),
    (b"\x08\x01\x12", "a TensorFlow model", _CONVERT),
    (b"\x89PNG", "a picture", "give the weights file"),
    (b"\xff\xd8\xff", "a picture", "give the weights file"),
    (b"%PDF", "a PDF document", "give the weights file"),
)
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # how a text may begin, and what it is then
_UNKNOWN = "no weights file, or one that is damaged at its beginning"
_NAMES = (
    ((".onnx",), "an ONNX model", _CONVERT),
    ((".h5", ".hdf5", ".keras"), "a Keras model", _CONVERT),
    ((".tflite", ".pb", ".index", ".meta"), "a TensorFlow model", _CONVERT),
    ((".msgpack",), "a Flax model", _CONVERT),
    ((".npy", ".npz"), "NumPy arrays", _CONVERT),
)


def kind_of(path: Path) -> Kind:
    """Which reader a file is for. Its content decides; its name, where that says nothing.

    Raises:
        WeightsError: If it is another kind of file: what it is, and what to do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise WeightsError(f"{printable(path)} cannot be read: {error.strerror}.") from error
    if head.startswith(_PICKLES):
        return "torch"
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path, head)
    if head[8:9] == b"{" and head[5:8] == bytes(3):  # a header below a terabyte, in JSON
        return "safetensors"
    _refuse_others(path, head)
    for endings, what, way_out in _NAMES:
        if path.suffix.lower() in endings:
            raise _another(path, what, way_out)
    allowed = (SAFETENSORS, *TORCH_SUFFIXES)
    if path.suffix.lower() in allowed:
        if _is_pickle(path):
            return "torch"  # of a protocol that torch refuses; what it names can still be told
        words = _text(head)
        if words:
            what = f"a text that begins with {words[:_WORDS]!r}, not weights"
            raise _another(path, what, _AGAIN)
        if path.suffix == SAFETENSORS:
            return "safetensors"  # whose reader tells what is wrong with it
        raise _another(path, _UNKNOWN, _AGAIN)
    raise WeightsError(
        f"{printable(path)}: weights files end in {', '.join(allowed)}, and the content of this "
        "one is none."
    )


def _kind_of_zip(path: Path, head: bytes) -> Kind:
    """`torch.save` writes a zip archive whose first entry is the pickle."""
    size = int.from_bytes(head[26:28], "little")
    first = head[30 : 30 + size]
    if first.endswith(b".npy"):
        raise _another(path, "an archive of NumPy arrays (.npz)", _CONVERT)
    if first in (b"metadata.json", b"config.json", b"model.weights.h5"):
        raise _another(path, "a Keras model", _CONVERT)
    if first.endswith((b".pth", b".pt", b".safetensors", b".ckpt", b".bin", b".tar")):
        raise _another(path, "a zip archive", _UNPACK)
    return "torch"


def _refuse_others(path: Path, head: bytes) -> None:
    if not head:
        raise _another(path, "an empty file", _AGAIN)
    for beginning, what, way_out in _BEGINNINGS:
        if head.startswith(beginning):
            raise _another(path, what, way_out)
    text = _text(head)
    if text.startswith("<"):
        raise _another(path, "a web page, not the file that it is about", _FETCH)
    if text.startswith("{") and "weight_map" in text:
        raise _another(path, "the list of the parts of a model", "merge the parts into one file")
    if text.startswith(("{", "[")):
        raise _another(path, "a JSON text, such as a config or the answer of a server", _FETCH)
    if head[257:262] == b"ustar":
        raise _another(path, "a tar archive", _UNPACK)
    if head[4:8] == b"TFL3":
        raise _another(path, "a TensorFlow Lite model", _CONVERT)
    version = int.from_bytes(head[1:2], "little")
    if head[:1] == b"\x08" and 3 <= version <= 32 and head[2:3] in (b"\x12", b"\x3a", b"\x42"):
        raise _another(path, "an ONNX model", _CONVERT)


def _text(head: bytes) -> str:
    """The text that a file begins with, without blanks before it; "" where it is none."""
    coding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
    try:
        text = codecs.getincrementaldecoder(coding)().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return ""
    text = text.strip()
    return text if "".join(text.split()).isprintable() else ""


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of any protocol, or would run as one before it breaks off."""
    with path.open("rb") as file:
        begin = io.BytesIO(file.read(_MODEL_SCAN))
    names: list[str] = []
    with suppress(ValueError, LookupError, RecursionError):
        names += (code.name for code, _, _ in islice(pickletools.genops(begin), _INSTRUCTIONS))
    made = not _MAKES.isdisjoint(names) or {"MARK", "INST"} <= set(names)
    return made or len(names) == _INSTRUCTIONS or names[-1:] == ["STOP"]


def _another(path: Path, what: str, way_out: str) -> WeightsError:
    return WeightsError(f"{printable(path)} is {what}; {way_out}.")


def refuse_model(path: Path) -> None:
    """Refuses a file of `torch.save` with a whole pickled model: it names the classes of layers.

    The pickle comes first in such a file, and names its first layer in its first megabyte.

    Raises:
        WeightsError: If it is one.
    """
    with path.open("rb") as file:
        layer = _LAYER.search(file.read(_MODEL_SCAN))
    if layer is not None:
        name = b".".join(layer.groups()).decode("ascii")
        raise WeightsError(
            f"{printable(path)} holds a whole pickled model: it asks for {name!r} while loading. A "
            "pickle can run any code that way, so it is refused. Ask its author for its tensors, "
            "as a .safetensors file or by torch.save(model.state_dict(), 'weights.pth')."
        )


def refuse_arrays(path: Path, most: int) -> None:
    """Refuses a pickle of NumPy arrays without a tensor, before it is measured as one of tensors.

    Args:
        path: The file.
        most: Bytes that are looked at; a longer pickle is not read anyway.

    Raises:
        WeightsError: If it is one.
    """
    with path.open("rb") as file:
        pickle = file.read(most)
    if _ARRAY.search(pickle) is not None and b"_rebuild_" not in pickle:
        raise WeightsError(
            f"{printable(path)} holds NumPy arrays, not tensors, and a pickle of them can run any "
            "code. Where it can be trusted, write its state dict anew: torch.save({name: "
            "torch.tensor(array) for name, array in state.items()}, 'weights.pth')."
        )
