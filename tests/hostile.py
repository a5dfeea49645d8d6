"""Weights files that nobody means well with, each as small as it can be: what the tests write."""

import json
import resource
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from forks import fork, wait

from bdclean.backbones import ModelInfo, build, load_model
from bdclean.errors import ConfigError, WeightsError
from bdclean.weights import write

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)
INFO = ModelInfo("resnet18", 4, 8, MEAN, STD, width=4)


class Call:
    """Pickled, it asks for a call; with a state, for `BUILD` after it."""

    def __init__(self, function, *arguments, state=None):
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.made


@cache
def _model():
    torch.manual_seed(0)
    return build(INFO)


def good():
    """The state dict of a backbone that fits `INFO`."""
    return OrderedDict(_model().backbone.state_dict())


def saved(content, **options):
    """Written by torch.save."""
    return lambda path: torch.save(content() if callable(content) else content, path, **options)


def legacy(content):
    return saved(content, _use_new_zipfile_serialization=False)


def changed(**tensors):
    """A good state dict in which some tensors are others."""
    return saved(lambda: good() | {name.replace("__", "."): t for name, t in tensors.items()})


def raw(*content):
    return lambda path: path.write_bytes(b"".join(content))


def zipped(pickle, storages=None, method=zipfile.ZIP_STORED, **entries):
    """A file as of torch.save, with any pickle."""

    def make(path):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("archive/data.pkl", pickle)
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/byteorder", b"little")
            for key, content in (storages or {}).items():
                archive.writestr(f"archive/data/{key}", content)
            for name, content in entries.items():
                archive.writestr(name, content)

    return make


# ---------------------------------------------------------------------- pickles by hand


def text(value):
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def storage(numel, key="0", kind="FloatStorage"):
    pid = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel)
    return b"(" + pid + b"tQ"


def storage_legacy(numel, key="0"):
    pid = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel)
    return b"(" + pid + b"NtQ"


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape, strides, of):
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + number(0)
    return head + numbers(*shape) + numbers(*strides) + b"\x89ccollections\nOrderedDict\n)RtR"


def pickled(*pairs):
    """A dict of names and values that are pickled already."""
    return b"\x80\x02}" + b"".join(key + value + b"s" for key, value in pairs) + b"."


def one(value, name="conv1.weight"):
    return pickled((text(name), value))


SMALL = tensor((1,), (1,), storage(1))
FOUR = {"0": bytes(4)}
PREAMBLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
SYSTEM = b"\x80\x02}" + text("little_endian") + b"\x88s."


def legacy_zeros(gigabytes):
    """A file of torch before 1.6 whose only storage is a hole of the disk."""

    def make(path):
        numel = gigabytes * 2**28
        pickle = one(tensor((numel,), (1,), storage_legacy(numel)))
        keys = b"\x80\x02](" + text("0") + b"e."
        path.write_bytes(PREAMBLE + SYSTEM + pickle + keys + struct.pack("<q", numel))
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size + numel * 4)

    return make


# ---------------------------------------------------------------------- safetensors by hand


def headed(header, content=b"", claims=None):
    """A safetensors file with any header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(header) if claims is None else claims
    return raw(size.to_bytes(8, "little"), header, content)


def entry(shape=(1,), dtype="F32", offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def own(**metadata):
    """A file of ours whose metadata says other things than it should."""

    def make(path):
        said = INFO.to_metadata() | metadata
        write(_model().state_dict(), path, {k: v for k, v in said.items() if v is not None})

    return make


def grown(make, size):
    """With a hole at its end."""

    def grow(path):
        make(path)
        with path.open("rb+") as file:
            file.truncate(size)

    return grow


def sparse_safetensors(size):
    header = json.dumps({"conv1.weight": entry((size // 4,), offsets=(0, size))}).encode()
    return grown(headed(header), 8 + len(header) + size)


def cut(make, most):
    """Its first bytes; its last ones are left out where `most` is negative."""

    def shorten(path):
        make(path)
        path.write_bytes(path.read_bytes()[:most])

    return shorten


def tuples(depth, shared=False):
    """A tuple in a tuple ...; where it is shared, twice in each."""
    if not shared:
        return b")" + b"\x85" * depth
    return b")" + b"".join(
        b"r" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"\x86" for n in range(depth)
    )


def itself(path):
    content = {"epoch": 3}
    content["state_dict"] = content
    torch.save(content, path)


def nested(depth, key="model"):
    """State dicts in state dicts."""
    opened = (b"}" + text(key)) * depth
    return zipped(b"\x80\x02" + opened + one(SMALL)[2:-1] + b"s" * depth + b".", FOUR)


def bomb(megabytes, pickle=None):
    """A zip whose entries inflate."""
    storages = {"0": bytes(megabytes << 20)}
    size = megabytes << 18
    return zipped(
        pickle or one(tensor((size,), (1,), storage(size))), storages, zipfile.ZIP_DEFLATED
    )


def overlapping(count, megabytes):
    """Many entries of the directory that name the same bytes."""

    def make(path):
        size = megabytes << 18
        values = [
            (text(f"w{n}"), tensor((size,), (1,), storage(size, str(n)))) for n in range(count)
        ]
        zipped(pickled(*values), {"0": bytes(megabytes << 20)})(path)
        with zipfile.ZipFile(path, "a") as archive:
            first = archive.getinfo("archive/data/0")
            for n in range(1, count):
                again = zipfile.ZipInfo(f"archive/data/{n}")
                again.header_offset, again.file_size = first.header_offset, first.file_size
                again.compress_size, again.CRC = first.compress_size, first.CRC
                archive.filelist.append(again)
            archive._didModify = True

    return make


def million(path):
    """One small tensor under a million names."""
    names = b"".join(text(f"{n}") + b"h\x00s" for n in range(10**6))
    zipped(b"\x80\x02}" + text("w") + SMALL + b"q\x00s" + names + b".", FOUR)(path)


def million_safetensors(path):
    one_of = '"w{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    headed(("{" + ",".join(map(one_of.format, range(10**6))) + "}").encode())(path)


def colliding(count):
    """Keys whose hash is the same."""
    return zipped(
        b"\x80\x02}" + b"".join(number(n * (2**61 - 1)) + b"Ns" for n in range(1, count)) + b"."
    )


def with_attribute(name):
    """An ordered dict with a method that is hidden behind a number."""
    ordered = b"ccollections\nOrderedDict\n)R" + text("conv1.weight") + SMALL + b"s"
    return zipped(b"\x80\x02" + ordered + b"}" + text(name) + b"K\x03sb.", FOUR)


# ---------------------------------------------------------------------- what is said of them


def table(groups):
    """What writes the file, and what is said of it, of each case."""
    cases = [(name, make, said) for said, made in groups.items() for name, make in made.items()]
    return [pytest.param(make, said, id=name) for name, make, said in cases]


def load(path, **given):
    """What is said of a file, with FILE for its path; nothing where it is read."""
    try:
        load_model(path, **given)
    except (WeightsError, ConfigError) as error:
        return str(error).replace(str(path), "FILE")
    return ""


def check(said, sentence):
    """Compares what was said; "..." at the end of a sentence stands for more."""
    whole = f"FILE{sentence}" if sentence else ""
    assert said.startswith(whole[:-3]) if whole.endswith("...") else said == whole
    assert said.count("FILE") == bool(sentence)
    assert len(said) < 2000
    assert "\n" not in said


def in_bounds(path, sentence, **given):
    """Compares what is said, within 20 seconds and 2 GiB, all that is imported included."""
    log = path.with_name("log")
    assert wait(fork(lambda: _measured(path, **given), log), seconds=20) == 0, log.read_text()
    *said, kilobytes = log.read_text().splitlines()
    check("\n".join(said), sentence)
    assert int(kilobytes) < 2 << 20


def _measured(path, **given):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (3 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(load(path, **given))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
