"""What a file is: told by its content, whatever its name."""

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import uuid
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from bdclean.errors import WeightsError
from bdclean.weights import describe, read, read_nests
from bdclean.weights.harmless import HARMLESS

STATE = {"b.weight": torch.arange(12.0).view(3, 4), "a": torch.arange(5)}
ENDINGS = (".pkl", ".th", ".model", ".pyth", "", ".pt", ".safetensors", ".zip", ".weights", ".h5")


def _saved(content, **arguments):
    file = io.BytesIO()
    torch.save(content, file, **arguments)
    return file.getvalue()


def _zip(**entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "."), content)
    return file.getvalue()


def _npz():
    file = io.BytesIO()
    np.savez(file, a=np.arange(3))
    return file.getvalue()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "content",
    [
        _saved(STATE),
        _saved({"state_dict": STATE, "epoch": 3}, _use_new_zipfile_serialization=False),
        save(STATE),
    ],
    ids=["zip", "legacy", "safetensors"],
)
def test_the_content_decides_which_reader_takes_a_file(content, ending, tmp_path):
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    found, _ = read(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


OTHERS = {
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a Git LFS pointer, not",
    ),
    "page": (b"\n<!DOCTYPE html><html><title>Quota exceeded</title>", "a web page, not the file"),
    "saved page": (
        b"\xef\xbb\xbf<!-- saved from url -->\r\n<!DOCTYPE html>",
        "a web page, not the file that it is about; download the file itself",
    ),
    "cut page": (b"<p>Caf\xc3\xa9</p>".ljust(511) + "\u00e9".encode(), "a web page, not the file"),
    "config": (
        b'{"model_type": "resnet"}',
        "a JSON text, such as a config or the answer of a server",
    ),
    "error": ('{"error": "Not found"}'.encode("utf-16"), "a JSON text, such as a config or the"),
    "list": (b"\n[1, 2, 3]", "a JSON text, such as a config or the answer of a server; download"),
    "nothing": (b"", "an empty file; download it again"),
    "empty zip": (_zip(), "an empty zip archive; download it again"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a web page, not the file"),
    "gzip": (b"\x1f\x8b\x08\x00 and more", "a gzip archive; unpack it"),
    "bzip2": (b"BZh91AY&SY", "a bzip2 archive; unpack it"),
    "xz": (b"\xfd7zXZ\x00\x00", "an xz archive; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x00", "a zstd archive; unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    "rar": (b"Rar!\x1a\x07\x00", "a rar archive; unpack it"),
    "tar": (bytes(257) + b"ustar\x00", "a tar archive; unpack it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras and others); convert it"),
    "npy": (b"\x93NUMPY\x01\x00", "a NumPy array; convert it"),
    "npz": (_npz(), "an archive of NumPy arrays (.npz); convert it"),
    "Keras": (_zip(metadata__json="{}", config__json="{}"), "a Keras model; convert it"),
    "zipped": (_zip(resnet18__pth="..."), "a zip archive; unpack it"),
    "TensorFlow": (b"\x08\x01\x12\x7f\n\x04", "a TensorFlow model; convert it"),
    "TFLite": (b"\x1c\x00\x00\x00TFL3", "a TensorFlow Lite model; convert it"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x05", "an ONNX model; convert it"),
    "GGUF": (b"GGUF\x03\x00", "a GGUF file; convert it"),
    "index": (b'{"metadata": {}, "weight_map": {}}', "the list of the parts of a model; merge"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "a picture; give the weights file"),
    "JPEG": (b"\xff\xd8\xff\xe0", "a picture; give the weights file"),
    "PDF": (b"%PDF-1.4", "a PDF document; give the weights file"),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_other_files_are_named_with_the_way_out(kind, ending, tmp_path):
    content, said = OTHERS[kind]
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as told:
        read(path)
    assert str(told.value).startswith(f"{path} is {said}")
    assert str(told.value).endswith(".")


@pytest.mark.parametrize(
    "content",
    [b"Entry not found", b"# My model\n\nIts weights", "Zugriff verweigert \u2014 403".encode()],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".bin"])
def test_a_text_under_the_name_of_weights_is_told_by_its_first_words(content, ending, tmp_path):
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as told:
        read(path)
    assert str(told.value) == (
        f"{path} is a text that begins with {content.decode()!r}, not weights; download it again, "
        "or give the weights file."
    )
    assert describe(path).kind == f"a text that begins with {content.decode()!r}, not weights"


def test_bytes_of_no_kind_are_no_file_of_an_old_torch(tmp_path):
    (tmp_path / "x.pth").write_bytes(bytes(3000))
    assert describe(tmp_path / "x.pth").kind == (
        "no weights file, or one that is damaged at its beginning"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'ls'\ntR.",
        b"cos\nsystem\n(S'ls'\ntR and breaks off",
        b"(S'ls'\nios\nsystem\n.",
    ],
)
def test_a_pickle_of_text_is_told_by_what_it_would_run(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    assert describe(tmp_path / "x.pth").objects == ("os.system",)
    with pytest.raises(WeightsError):
        read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.onnx", "is an ONNX model; convert it"),
        ("graph.pb", "is a TensorFlow model; convert it"),
        ("model.ckpt-1.index", "is a TensorFlow model; convert it"),
        ("flax_model.msgpack", "is a Flax model; convert it"),
        ("weights.h5", "is a Keras model; convert it"),
        ("weights.xyz", r"weights files end in \.safetensors, .* the content of this one is none"),
        ("weights", r"weights files end in \.safetensors, .* the content of this one is none"),
    ],
)
@pytest.mark.parametrize("content", [b"\x0a", b"\x08", b"\x0a\x13\x0a\x05input", b"something else"])
def test_where_the_content_says_nothing_the_name_does(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        read(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_is_named_with_the_line_that_saves_its_tensors(zipped, tmp_path):
    content = {"model": nn.Sequential(nn.Linear(2, 2)), "epoch": 3}
    (tmp_path / "x.pkl").write_bytes(_saved(content, _use_new_zipfile_serialization=zipped))
    with pytest.raises(WeightsError) as told:
        read(tmp_path / "x.pkl")
    said = str(told.value)
    assert (
        "holds a whole pickled model: it asks for 'torch.nn.modules.container.Sequential'" in said
    )
    assert "torch.save(model.state_dict(), 'weights.pth')" in said


@pytest.mark.parametrize("size", [3, 600])
@pytest.mark.parametrize("way", ["torch", "legacy", 2, 3, 4, 5])
@pytest.mark.parametrize("nested", [True, False])
def test_numpy_arrays_are_named_with_the_line_that_makes_tensors_of_them(
    size, way, nested, tmp_path
):
    state = {f"layer{n}.weight": np.zeros((size, size), np.float32) for n in range(4)}
    content = {"state_dict": state, "epoch": 3} if nested else state
    path = tmp_path / "x.pkl"
    if isinstance(way, int):
        path.write_bytes(pickle.dumps(content, way))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")
    with pytest.raises(WeightsError) as told:
        read(path)
    assert str(told.value) == (
        f"{path} holds NumPy arrays, not tensors, and a pickle of them can run any code. Where it "
        "can be trusted, write its state dict anew: torch.save({name: torch.tensor(array) for "
        "name, array in state.items()}, 'weights.pth')."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_named_with_the_line_that_saves_its_tensors(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pkl")
    with pytest.raises(WeightsError, match=r"TorchScript archive.*\.safetensors|state_dict\(\)"):
        read(tmp_path / "x.pkl")


BESIDE = {
    "argparse": argparse.Namespace(lr=0.1, layers=[1, 2], path=pathlib.Path("a")),
    "NumPy number": np.float64(93.2),
    "NumPy integer": np.int64(3),
    "NumPy truth": np.bool_(True),
    "NumPy dtype": np.dtype("float32"),
    "NumPy array": np.arange(6).reshape(2, 3),
    "NumPy text": np.array(["airplane", "bird"]),
    "path": pathlib.PurePosixPath("a/b"),
    "date": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(seconds=3),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("abc"),
    "size": torch.Size([1, 2]),
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "version": torch.__version__,
    "uuid": uuid.UUID(int=3),
    "deque": collections.deque([1, 2], maxlen=3),
    "range": range(3),
    "slice": slice(3),
    "frozenset": frozenset({1, 2}),
    "expanded tensor": torch.arange(3).expand(4, 3),
    "extra state": {"layer._extra_state": torch.ones(3), "_extra_state": None},
    "set": {1, 2},
    "complex": 1j,
    "bytes": b"abc",
    "tensor": torch.ones(3),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", sorted(BESIDE))
def test_harmless_things_beside_a_state_dict_do_not_matter(kind, zipped, tmp_path):
    content = {"args": BESIDE[kind], "net": STATE, "log": [BESIDE[kind]]}
    (tmp_path / "x.pth").write_bytes(_saved(content, _use_new_zipfile_serialization=zipped))
    found, _ = read(tmp_path / "x.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


def test_a_state_dict_in_a_defaultdict_is_found(tmp_path):
    torch.save(collections.defaultdict(list, model=STATE), tmp_path / "x.pth")
    assert read(tmp_path / "x.pth")[0].keys() == STATE.keys()


@pytest.mark.parametrize("extra", [None, b"abc", {"a": 1}, torch.ones(3), [1]])
@pytest.mark.parametrize("name", ["_extra_state", "layer._extra_state"])
def test_what_layers_keep_beside_their_tensors_is_left_out(extra, name, tmp_path):
    torch.save({"net": STATE | {name: extra}}, tmp_path / "x.pth")
    assert read(tmp_path / "x.pth")[0].keys() == STATE.keys()


def test_what_layers_keep_beside_their_tensors_is_left_out_of_safetensors(tmp_path):
    save_file(STATE | {"layer._extra_state": torch.ones(3)}, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors")[0].keys() == STATE.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_small_tensor_that_repeats_its_numbers_is_read(zipped, tmp_path):
    state = STATE | {"places": torch.arange(3).expand(4, 3), "one": torch.ones(1).expand(2, 2)}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found, _ = read(tmp_path / "x.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_tensors_that_repeat_their_numbers_are_no_larger_than_the_file(tmp_path):
    one = torch.ones(1)
    many = {f"x{n}": one.expand(2, 2, 2) for n in range(200)}
    torch.save(many, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="has a tensor of 8 numbers of which only 1 are in the"):
        read(tmp_path / "x.pth")


def test_harmless_objects_are_not_made(tmp_path, monkeypatch):
    """In their place come stubs, which take anything and keep nothing."""
    made = []
    monkeypatch.setattr(argparse.Namespace, "__setstate__", made.append, raising=False)
    torch.save({"args": argparse.Namespace(secret=torch.ones(7)), "net": STATE}, tmp_path / "x.pt")
    nests, _ = read_nests(tmp_path / "x.pt")
    assert made == []
    assert [nest.where for nest in nests] == ["net"]
    assert all(vars(stub(1, 2)) == {} for stub, name in HARMLESS if name == "argparse.Namespace")


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(print, id="function"),
        pytest.param(getattr, id="getattr"),
        pytest.param(argparse.ArgumentParser, id="class"),
        pytest.param(pathlib.Path.unlink, id="method"),
        pytest.param(np.load, id="NumPy function"),
        pytest.param(collections.ChainMap({}), id="ChainMap"),
    ],
)
def test_no_other_object_is_let_through(odd, tmp_path):
    torch.save({"x": odd, "net": STATE}, tmp_path / "x.pt")
    with pytest.raises(WeightsError):
        read(tmp_path / "x.pt")


def test_the_list_of_harmless_names_is_gone_after_reading(tmp_path):
    torch.save({"args": argparse.Namespace(), "net": STATE}, tmp_path / "x.pt")
    before = set(torch.serialization.get_safe_globals())
    read(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)


def test_reading_tells_nothing(tmp_path):
    torch.save({"acc": np.float64(3), "net": STATE}, tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path / "x.pt")
