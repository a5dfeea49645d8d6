"""Weights files that nobody means well with: each ends in its own sentence, or is read."""

import os
import tarfile
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from hostile import (
    FOUR,
    PREAMBLE,
    SMALL,
    SYSTEM,
    Call,
    bomb,
    changed,
    check,
    colliding,
    cut,
    entry,
    good,
    grown,
    headed,
    in_bounds,
    itself,
    legacy,
    legacy_zeros,
    load,
    million,
    million_safetensors,
    nested,
    number,
    numbers,
    one,
    overlapping,
    own,
    pickled,
    raw,
    saved,
    sparse_safetensors,
    storage,
    storage_legacy,
    table,
    tensor,
    text,
    tuples,
    with_attribute,
    zipped,
)
from torch import nn

from bdclean.errors import ConfigError, WeightsError
from bdclean.weights import bounds, read

pytestmark = pytest.mark.filterwarnings("ignore")
W = "conv1.weight"
FIT = " does not fit resnet18 (width 4, stem cifar, input size 8): "
BROKEN = " is damaged or was not written by torch.save ("


class Sub(torch.Tensor):
    """A class of somebody."""


def quantized():
    return torch.quantize_per_tensor(torch.zeros(4, 3, 3, 3), 0.1, 0, torch.qint8)


def ragged():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


# What is said after the path of each file, "..." for more; nothing of those that are read.
TORCH = {
    " is not a state dict: 1 entry is no plain tensor (conv1.weight).": {
        "meta": changed(conv1__weight=torch.zeros(4, 3, 3, 3, device="meta")),
        "nested": saved(lambda: {W: ragged()}),
        "sparse": saved(lambda: {W: torch.eye(3).to_sparse()}),
        "sparse csr": saved(lambda: {W: torch.eye(3).to_sparse_csr()}),
        "quantized": saved(lambda: {W: quantized()}),
        "strings": saved(lambda: {"conv1.weight": "x"}),
    },
    f"{FIT}1 misshaped (backbone.conv1.weight: complex64 (4, 3, 3, 3) instead of float32 (4,...": {
        "complex": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.complex64)),
        "conj": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.complex64).conj()),
    },
    f"{FIT}1 misshaped (backbone.conv1.weight: bool (4, 3, 3, 3) instead of float32 (4, 3, 3...": {
        "bool": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.bool)),
    },
    f"{FIT}1 misshaped (backbone.conv1.weight: int64 (4, 3, 3, 3) instead of float32 (4, 3, ...": {
        "int": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.int64)),
    },
    "": {
        "list": saved(lambda: [good()]),
        "float8": changed(conv1__weight=torch.zeros(4, 3, 3, 3).to(torch.float8_e5m2)),
        "expanded fit": changed(conv1__weight=torch.zeros(1).expand(4, 3, 3, 3)),
        "double": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.float64)),
        "half": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.float16)),
        "neg": changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.complex64).conj().imag),
        "parameter": changed(conv1__weight=nn.Parameter(torch.zeros(4, 3, 3, 3))),
        "transposed": changed(conv1__weight=torch.zeros(3, 3, 3, 4).permute(3, 0, 1, 2)),
    },
    " asks for the Python object...": {
        "subclass": changed(conv1__weight=torch.zeros(4, 3, 3, 3).as_subclass(Sub)),
    },
    " has a dictionary with Python attributes of its own (items).": {
        "od items": with_attribute("items"),
    },
    " has a dictionary with Python attributes of its own (keys).": {
        "od keys": with_attribute("keys"),
    },
    f"{FIT}99 missing (...": {
        "od metadata": with_attribute("_metadata"),
        "65 dims": saved(lambda: {W: torch.zeros([1] * 64)}),
        "cuda loc": zipped(one(tensor((1,), (1,), storage(1).replace(b"cpu", b"xxx"))), FOUR),
    },
    " has a dictionary with Python attributes of its own (get).": {
        "od get": with_attribute("get"),
    },
    " has a tensor whose name has 100,012 characters, more than 500: a.a.a.a.a.a.a.a.a.a.a.a...": {
        "deep keys": saved(lambda: {"a." * 50_000 + "conv1.weight": torch.zeros(1)}),
    },
    f"{FIT}100 missing (...": {
        "int key": saved(lambda: {3: torch.zeros(1)}),
        "bytes key": saved(lambda: {b"a": torch.zeros(1)}),
        "escape key": saved(lambda: {"a\x1b[31m\n": torch.zeros(1)}),
    },
    f"{FIT}1 unexpected (\\ud800).": {
        "surrogate key": saved(lambda: good() | {"\ud800": torch.zeros(1)}),
    },
    f"{BROKEN}its zip directory is not at its end).": {
        "truncated pt": cut(saved(good), -200),
        "truncated head": cut(saved(good), 100),
    },
    f"{BROKEN}...": {
        "truncated legacy": cut(legacy(good), -200),
        "neg stride": zipped(one(tensor((2,), (-1,), storage(4))), {"0": bytes(16)}),
        "memo missing": zipped(b"\x80\x02h\x05."),
        "stack empty": zipped(b"\x80\x02."),
        "no stop": zipped(b"\x80\x02}"),
    },
    " is an empty file; download it again, or give the weights file.": {
        "empty pt": raw(b""),
    },
    " is a folder; give the weights file in it.": {
        "dir": lambda p: p.mkdir(),
    },
    " is a device, a pipe or a socket; give a file on a disk.": {
        "fifo": os.mkfifo,
        "device": lambda p: p.symlink_to("/dev/zero"),
    },
    ": there is no such weights file.": {
        "dangling": lambda p: p.symlink_to("/nonexistent"),
    },
    f"{FIT}1 misshaped (backbone.conv1.weight: float32 (0, 3, 3, 3) instead of float32 (4, 3...": {
        "zero-size": changed(conv1__weight=torch.zeros(0, 3, 3, 3)),
    },
    f"{FIT}1 misshaped (backbone.conv1.weight: float32 () instead of float32 (4, 3, 3, 3)).": {
        "scalar": changed(conv1__weight=torch.tensor(1.0)),
    },
    f"{FIT}1 misshaped (backbone.conv1.weight: float32 (5, 3, 3, 3) instead of float32 (4, 3...": {
        "wrong shape": changed(conv1__weight=torch.zeros(5, 3, 3, 3)),
    },
    ": backbone.conv1.weight holds numbers that are not finite...": {
        "nan": changed(conv1__weight=torch.full((4, 3, 3, 3), torch.nan)),
        "inf": changed(conv1__weight=torch.full((4, 3, 3, 3), torch.inf)),
    },
    " has a tensor of 2 numbers of which only 1 are in the file.": {
        "offset out": zipped(one(tensor((2,), (1,), storage(1))), FOUR),
    },
    f"{BROKEN}a tensor is none).": {
        "size neg": zipped(one(tensor((-2,), (1,), storage(1))), FOUR),
    },
    " has a tensor of 9,223,372,036,854,775,808 numbers of which only 1 are in the file.": {
        "size 2^63": zipped(one(tensor((2**63,), (1,), storage(1))), FOUR),
    },
    f"{BROKEN}its storage 0 is missing or cut short).": {
        "record missing": zipped(one(SMALL)),
        "record short": zipped(one(tensor((4,), (1,), storage(4))), {"0": bytes(4)}),
    },
    f"{BROKEN}it has 0 pickles).": {
        "no pickle": lambda p: zipfile.ZipFile(p, "w").writestr("a/b", "c"),
    },
    " is an empty zip archive; download it again, or give the weights file.": {
        "empty zip": lambda p: zipfile.ZipFile(p, "w").close(),
    },
    " is no weights file, or one that is damaged at its beginning; download it again, or give...": {
        "tar": lambda p: tarfile.open(p, "w").close(),
    },
    " claims 4,722,366,482,869,645,213,696 bytes of tensors and has 621 in all.": {
        "huge numel": zipped(one(tensor((1,), (1,), storage(2**70))), FOUR),
    },
    " holds a Tensor, not a state dict.": {
        "tensor": saved(lambda: torch.zeros(3)),
    },
    " holds a set, not a state dict.": {
        "set": saved({1, 2}),
    },
    " is not a state dict: 1 entry is no plain tensor (a).": {
        "counter": saved(lambda: Counter(a=1)),
        "device obj": saved(lambda: {"a": torch.device("cuda:99")}),
        "dtype obj": saved(lambda: {"a": torch.float32}),
        "size obj": saved(lambda: {"a": torch.Size([1])}),
    },
    " is not a state dict: 2 entries are no plain tensors (state_dict, a).": {
        "nest of list": saved(lambda: {"state_dict": [1], "a": 3}),
    },
    " is not a state dict: 1 entry is no plain tensor (a tuple).": {
        "tuple key": saved(lambda: {("a", 1): torch.zeros(1)}),
    },
    " is a web page, not the file that it is about; download the file itself.": {
        "web page": raw(b"<!DOCTYPE html><html>..."),
    },
    " is a Git LFS pointer, not the file: it holds only the address of the weights; run git l...": {
        "lfs": raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"),
    },
    " holds a whole pickled model: it asks for 'torch.nn.modules.linear.Linear'...": {
        "module": saved(lambda: nn.Linear(2, 2)),
    },
    f"{BROKEN}the name of a storage is none).": {
        "pid int": zipped(b"\x80\x02K\x03Q."),
    },
}
SAFETENSORS = {
    "": {
        "pt as st": saved(good),
    },
    " is an empty file; download it again, or give the weights file.": {
        "empty st": raw(b""),
    },
    " is not a readable safetensors file (...": {
        "truncated st": cut(own(), -100),
        "header lie big": headed({"a": entry()}, bytes(4), claims=10**6),
        "header lie huge": headed({"a": entry()}, bytes(4), claims=2**63),
        "header 0": headed({"a": entry()}, bytes(4), claims=0),
        "offsets lie": headed({"a": entry(offsets=(0, 4000))}, bytes(4)),
        "offsets overlap": headed({"a": entry(), "b": entry()}, bytes(4)),
        "offsets back": headed({"a": entry(offsets=(4, 0))}, bytes(4)),
        "shape overflow": headed({"a": entry(shape=(2**62, 2**62))}, bytes(4)),
        "dtype wrong": headed({"a": entry(dtype="F99")}, bytes(4)),
        "meta not text": headed({"__metadata__": {"a": 3}, "a": entry()}, bytes(4)),
        "not utf8": headed(b'{"\xff\xfe": {}}'),
    },
}
LARGE_TORCH = {
    " has a tensor whose name has 280,012 characters, more than 500: module.module.module.mo...": {
        "wrappers": saved(lambda: {"module." * 40000 + "conv1.weight": torch.zeros(1)}),
    },
    " has a pickle of 6,000,139 bytes, more than is read...": {
        "name 50MB": zipped(pickled((text("a." * 3_000_000), SMALL)), FOUR),
    },
    " has a pickle of 13,889,032 bytes, more than is read...": {
        "million": million,
    },
    " has a dictionary that holds itself.": {
        "itself": itself,
    },
    " has dictionaries in dictionaries, more than 20 deep.": {
        "nest model": nested(20_000),
    },
    " has a tensor of 10,000,000,000 numbers of which only 1 are in the file.": {
        "expanded": saved(lambda: {W: torch.zeros(1).expand(10**5, 10**5)}),
        "qtensor": saved(
            lambda: {
                W: Call(
                    torch._utils._rebuild_qtensor,
                    torch.zeros(1, dtype=torch.uint8).untyped_storage(),
                    0,
                    (10**5, 10**5),
                    (0, 0),
                    (torch.per_tensor_affine, 1.0, 0),
                    False,
                    OrderedDict(),
                )
            }
        ),
    },
    " has 21.5 GB, more than is read...": {
        "sparse20 pt": grown(saved(good), 20 << 30),
        "sparse20 zeros": grown(raw(b""), 20 << 30),
    },
    " is no zip archive and has 1.1 GB, more than is read...": {
        "sparse1 legacy": legacy_zeros(1),
    },
    " is a zip archive with compressed entries, as torch.save never writes them.": {
        "bomb": bomb(30),
        "bomb pickle": zipped(
            one(SMALL)[:-1] + b"N0" * 5_000_000 + b".", FOUR, zipfile.ZIP_DEFLATED
        ),
    },
    " is a zip archive of 4,204,876 bytes whose entries claim 209,722,342.": {
        "overlap": overlapping(50, 4),
    },
    " has dictionaries whose keys are neither text nor usual numbers...": {
        "tuple key": zipped(pickled((tuples(200_000), SMALL)), FOUR),
        "tuple shared key": zipped(pickled((tuples(60, True), SMALL)), FOUR),
        "collide": colliding(100_000),
    },
    " calls what is no function.": {
        "tuple shared reduce": zipped(pickled((text("w"), tuples(40, True) + b")R")), FOUR),
    },
    " asks for the Python object 'builtins.bytearray' while loading....": {
        "bytearray": zipped(one(b"cbuiltins\nbytearray\n(" + number(8 * 10**9) + b"tR")),
    },
    " asks for the Python object 'torch.Tensor' while loading....": {
        "Tensor new": zipped(one(b"ctorch\nTensor\n" + numbers(10**5, 2 * 10**4) + b"\x81")),
    },
    " asks for the Python object 'torch.FloatTensor' while loading....": {
        "FloatTensor": zipped(one(b"ctorch\nFloatTensor\n" + numbers(10**5, 2 * 10**4) + b"R")),
    },
    " asks for the Python object '_codecs.encode' while loading....": {
        "idna": zipped(
            one(b"c_codecs\nencode\n(" + text("\u00e9" * 300_000) + text("idna") + b"tR")
        ),
    },
    " changes a tensor after it was made.": {
        "set_": zipped(
            one(
                SMALL
                + b"("
                + storage(1)
                + number(0)
                + numbers(10**5, 10**5)
                + numbers(0, 0)
                + b"tb"
            ),
            FOUR,
        ),
    },
    " claims 4,000,000,000,000 bytes of tensors and has 623 in all.": {
        "numel zip": zipped(one(tensor((10**12,), (1,), storage(10**12))), FOUR),
    },
    " claims 400,000,000,000 bytes of tensors and has 217 in all.": {
        "numel legacy": raw(
            PREAMBLE,
            SYSTEM,
            one(tensor((10**11,), (1,), storage_legacy(10**11))),
            b"\x80\x02](" + text("0") + b"e.",
        ),
    },
}
LARGE_SAFETENSORS = {
    " has a tensor whose name has 280,012 characters, more than 500: module.module.module.mo...": {
        "wrappers st": headed({"module." * 40000 + "conv1.weight": entry()}, bytes(4)),
    },
    " has a header of 58,888,891 bytes, more than is read...": {
        "million st": million_safetensors,
    },
    " has a header of 5,000,000 bytes, more than is read...": {
        "deep json header": headed(b"[" * 5_000_000),
    },
    " has 21.5 GB, more than is read...": {
        "sparse20 st": sparse_safetensors(20 << 30),
    },
    f"{FIT}99 missing (...": {
        "sparse1.8 st": sparse_safetensors(18 << 26),
    },
}


@pytest.mark.parametrize(("make", "sentence"), table(TORCH))
def test_an_odd_file_of_torch(make, sentence, tmp_path):
    make(tmp_path / "x.pt")
    check(load(tmp_path / "x.pt", arch="resnet18", width=4, input_size=8), sentence)


@pytest.mark.parametrize(("make", "sentence"), table(SAFETENSORS))
def test_an_odd_file_of_safetensors(make, sentence, tmp_path):
    make(tmp_path / "x.safetensors")
    check(load(tmp_path / "x.safetensors", arch="resnet18", width=4, input_size=8), sentence)


@pytest.mark.parametrize(("make", "sentence"), table(LARGE_TORCH))
def test_a_file_of_torch_that_asks_for_everything(make, sentence, tmp_path):
    make(tmp_path / "x.pt")
    in_bounds(tmp_path / "x.pt", sentence, arch="resnet18", width=4, input_size=8)


@pytest.mark.parametrize(("make", "sentence"), table(LARGE_SAFETENSORS))
def test_a_file_of_safetensors_that_asks_for_everything(make, sentence, tmp_path):
    make(tmp_path / "x.safetensors")
    in_bounds(tmp_path / "x.safetensors", sentence, arch="resnet18", width=4, input_size=8)


def test_the_limit_can_be_raised(tmp_path, monkeypatch):
    state = {"a" * 30: torch.zeros(300)}
    torch.save(state, tmp_path / "x.pt")
    monkeypatch.setenv(bounds.VARIABLE, "0.000001")
    with pytest.raises(WeightsError, match=r"set the environment variable BDCLEAN_MAX_WEIGHTS_GB"):
        read(tmp_path / "x.pt")
    monkeypatch.setenv(bounds.VARIABLE, "3")
    assert read(tmp_path / "x.pt")[0].keys() == state.keys()
    assert bounds.limit() == 3


@pytest.mark.parametrize("value", ["much", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_none(value, monkeypatch):
    monkeypatch.setenv(bounds.VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"^BDCLEAN_MAX_WEIGHTS_GB={value}: it must be a num"):
        bounds.limit()


def test_a_file_without_permission(tmp_path, monkeypatch):
    torch.save(good(), tmp_path / "x.pt")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(WeightsError, match=r"x\.pt cannot be read: Permission denied\.$"):
        read(tmp_path / "x.pt")


def test_what_a_zip_says_of_itself_must_be_so(tmp_path):
    """Readers of zip archives disagree on these, so that one could be checked and another read."""
    torch.save(good(), tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    for odd in (content + b"\0" * 9, b"PK\3\4" + content, content[:-2] + b"\1\0" + b"c"):
        (tmp_path / "x.pt").write_bytes(odd)
        with pytest.raises(WeightsError, match="its zip directory is"):
            read(tmp_path / "x.pt")
