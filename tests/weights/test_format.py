"""Weights files: safe reading, atomic writing, one message for each wrong file."""

import hashlib
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from bdclean.errors import WeightsError
from bdclean.weights import read, write


def _state():
    generator = torch.Generator().manual_seed(1)
    return {"b.weight": torch.randn(3, 4, generator=generator), "a": torch.arange(5)}


class TouchFile:
    """Unpickled without restriction, it makes the folder that it was given."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_round_trip_keeps_bits_metadata_and_dtype(tmp_path):
    state = {**_state(), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    write(state, tmp_path / "new" / "x.safetensors", {"what": "é, victim"})
    found, metadata = read(str(tmp_path / "new" / "x.safetensors"))
    assert metadata == {"what": "é, victim"}
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_hash_is_of_the_content(tmp_path):
    path = tmp_path / "x.safetensors"
    assert write(_state(), path, {"a": "1"}) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_weights_have_equal_hashes_in_any_process(tmp_path):
    metadata = dict.fromkeys("qwertyuiopasdfgh", "1")
    hashes = {write(_state(), tmp_path / f"{i}.safetensors", metadata) for i in range(8)}
    assert len(hashes) == 1


def test_writes_views_and_channels_last(tmp_path):
    base = torch.randn(4, 3, 2, 2)
    state = {"all": base, "half": base[:2], "last": base.to(memory_format=torch.channels_last)}
    write(state, tmp_path / "x.safetensors", {})
    found, _ = read(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(_state(), path, {})
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be written: No space left"):
        write({"other": torch.ones(2)}, path, {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_written_file_has_the_permissions_of_a_new_file(tmp_path):
    write(_state(), tmp_path / "x.safetensors", {})
    (tmp_path / "plain").write_bytes(b"")
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "x.safetensors").stat().st_mode == mode


def test_write_refuses_nothing(tmp_path):
    with pytest.raises(WeightsError, match="no tensors to write"):
        write({}, tmp_path / "x.safetensors", {})


def test_write_refuses_other_endings(tmp_path):
    with pytest.raises(WeightsError, match=r"x\.pt: weights are written as \.safetensors"):
        write(_state(), tmp_path / "x.pt", {})


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_torch_files(tmp_path, suffix, zipped):
    path = tmp_path / f"x{suffix}"
    torch.save(_state(), path, _use_new_zipfile_serialization=zipped)
    found, metadata = read(path)
    assert metadata == {}
    assert all(torch.equal(found[name], tensor) for name, tensor in _state().items())


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state_dict": state, "loss": 0.1},
        lambda state: {"net": state, "acc": 95.0},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_finds_the_nested_state_dict(tmp_path, nest):
    torch.save(nest(_state()), tmp_path / "x.pt")
    assert read(tmp_path / "x.pt")[0].keys() == _state().keys()


INFO = {"bdclean_format": "1", "arch": '"resnet18"', "width": "4"}


def _checkpoint(record):
    """Two networks, of which `model` is the product, as our modules keep them."""
    ours = {f"model.{name}": tensor for name, tensor in _state().items()}
    others = {f"teacher.{name}": tensor + 1 for name, tensor in _state().items()}
    kept = {"state_dict": ours | others, "epoch": 3, "hyper_parameters": {"lr": 0.1}}
    return kept if record is None else kept | {"bdclean": record}


def test_of_a_checkpoint_of_ours_the_model_is_read_and_what_describes_it(tmp_path):
    record = {"method": "cbd", "stage": 1, "networks": {"teacher": {"x": "y"}, "model": INFO}}
    torch.save(_checkpoint(record), tmp_path / "last.ckpt")
    found, metadata = read(tmp_path / "last.ckpt")
    assert metadata == INFO
    assert found.keys() == _state().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in _state().items())


@pytest.mark.parametrize(
    ("stage", "told"), [(0, "stage fit, number 1 of 2"), (1, "stage rest, number 2 of 2"), (2, "")]
)
def test_the_network_of_an_unfinished_run_is_named(tmp_path, stage, told):
    record = {"method": "advrbd", "stage": stage, "plan": [("fit", 3), ("rest", 1)]}
    torch.save(_checkpoint(record | {"networks": {"model": INFO}}), tmp_path / "last.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path / "last.ckpt")
    said = [str(each.message) for each in caught]
    assert len(said) == bool(told)
    assert all("unfinished run of advrbd: its network 'model' is taken" in text for text in said)
    assert all(told in text for text in said)


def test_what_an_unfinished_run_calls_itself_is_printable(tmp_path):
    record = {"method": "\x1b[31mred", "stage": 0, "plan": [("a\nbdclean: b", 3)]}
    torch.save(_checkpoint(record | {"networks": {"model": INFO}}), tmp_path / "\x1bx.ckpt")
    with pytest.warns(UserWarning, match="unfinished") as caught:
        read(tmp_path / "\x1bx.ckpt")
    assert all(str(each.message).isprintable() for each in caught)


def test_a_checkpoint_without_our_entry_is_a_foreign_file(tmp_path):
    torch.save(_checkpoint(None), tmp_path / "last.ckpt")
    found, metadata = read(tmp_path / "last.ckpt")
    assert metadata == {}
    assert found.keys() == _checkpoint(None)["state_dict"].keys()


@pytest.mark.parametrize(
    "record",
    [
        [INFO],
        "model",
        7,
        {},
        {"networks": None},
        {"networks": [INFO]},
        {"networks": {}},
        {"networks": {"teacher": INFO}},
        {"networks": {"model": "resnet18"}},
        {"networks": {"model": [("arch", "resnet18")]}},
        {"networks": {"model": INFO | {"width": 4}}},
        {"networks": {"model": INFO | {"width": None}}},
        {"networks": {"model": INFO | {"width": torch.ones(3)}}},
        {"networks": {"model": INFO | {"arch": {"name": "resnet18"}}}},
        {"networks": {"model": INFO | {3: "resnet18"}}},
    ],
)
def test_an_entry_that_describes_no_model_is_refused(tmp_path, record):
    path = tmp_path / "last.ckpt"
    torch.save(_checkpoint(record), path)
    with pytest.raises(WeightsError, match="its entry 'bdclean' does not describe a model") as told:
        read(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_an_entry_of_a_model_that_is_not_there_is_refused(tmp_path):
    content = _checkpoint({"networks": {"model": INFO}})
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "teacher" in k}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        read(tmp_path / "last.ckpt")


def test_an_entry_is_not_executed(tmp_path):
    victim = tmp_path / "executed"
    torch.save(_checkpoint({"networks": {"model": TouchFile(victim)}}), tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match="mkdir"):
        read(tmp_path / "last.ckpt")
    assert not victim.exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, suffix, zipped):
    victim = tmp_path / "executed"
    path = tmp_path / f"x{suffix}"
    content = {"state_dict": _state(), "extra": TouchFile(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"'(posix|nt)\.mkdir'.*\.safetensors"):
        read(path)
    assert not victim.exists()
    # The file is dangerous indeed: plain unpickling executes it.
    pickle.loads(pickle.dumps(TouchFile(victim)))  # noqa: S301
    assert victim.exists()


@pytest.mark.parametrize(("protocol", "message"), [(2, "mkdir"), (4, "more than tensors")])
def test_a_malicious_bare_pickle_is_refused_and_not_executed(tmp_path, protocol, message):
    victim = tmp_path / "executed"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(TouchFile(victim), protocol=protocol))
    with pytest.raises(WeightsError, match=message) as caught:
        read(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)  # torch's advice to execute it after all
    assert not victim.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive_is_refused_without_advice_to_trust_it(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="TorchScript") as caught:
        read(tmp_path / "x.pt")
    assert "False" not in str(caught.value)


def test_the_environment_cannot_switch_the_refusal_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    victim = tmp_path / "executed"
    torch.save(TouchFile(victim), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="mkdir"):
        read(tmp_path / "x.pt")
    assert not victim.exists()


def test_a_whole_pickled_module_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"'torch\.nn\.modules\.linear\.Linear'"):
        read(tmp_path / "x.pth")


def _folder(path: Path):
    path.mkdir()


def _missing(path: Path):
    pass


def _text(path: Path):
    path.write_text("not weights at all, but long enough to hold a header")


def _nothing(path: Path):
    path.write_bytes(b"")


def _half(path: Path):
    if path.suffix == ".safetensors":
        write(_state(), path, {})
    else:
        torch.save(_state(), path)
    path.write_bytes(path.read_bytes()[:-30])


def _empty(path: Path):
    if path.suffix == ".safetensors":
        path.write_bytes((2).to_bytes(8, "little") + b"{}")
    else:
        torch.save({}, path)


@pytest.mark.parametrize(
    ("make", "ending", "message"),
    [
        (_folder, ".pt", "is a folder"),
        (_missing, ".pt", "there is no such weights file"),
        (_missing, ".safetensors", "there is no such weights file"),
        (_text, ".txt", r"weights files end in \.safetensors, \.pt"),
        (
            _text,
            ".pt",
            "is a text that begins with 'not weights at all, .*', not weights; download",
        ),
        (_text, ".safetensors", "is a text that begins with 'not weights at all, "),
        (_nothing, ".pt", "is an empty file; download it again"),
        (_nothing, ".safetensors", "is an empty file; download it again"),
        (_half, ".pt", "is damaged or was not written by torch.save"),
        (_half, ".safetensors", "is not a readable safetensors file"),
        (_empty, ".pt", "holds no tensors"),
        (_empty, ".safetensors", "holds no tensors"),
        (lambda p: torch.save([torch.ones(1)], p), ".pt", "holds a list, not a state dict"),
        (
            lambda p: torch.save({"w": torch.ones(1), "lr": 0.1, "n": 2}, p),
            ".pt",
            r"2 entries are no plain tensors \(lr, n\)",
        ),
        (lambda p: torch.save({"w": torch.eye(2).to_sparse()}, p), ".pt", r"tensor \(w\)"),
        (lambda p: torch.save({"state_dict": {}}, p), ".pt", "holds no tensors"),
    ],
)
def test_each_wrong_file_has_one_message_with_its_path(tmp_path, make, ending, message):
    path = tmp_path / f"file{ending}"
    make(path)
    with pytest.raises(WeightsError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_torch_files_never_end_in_another_error(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(_state(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for position in torch.randint(len(content), (150,), generator=generator).tolist():
        path.write_bytes(content[:position] + b"\x93" + content[position + 1 :])
        try:
            read(path)
        except WeightsError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("address", ["https://x.org/a.pth", "http://x/a.pth?b=1", "s3://a/b.pt"])
def test_an_address_is_named_whole_and_not_fetched(address):
    with pytest.raises(WeightsError) as told:
        read(address)
    said = f"{address}: nothing is downloaded; fetch that file and give its path."
    assert str(told.value) == said


def test_no_path_at_all_is_told():
    with pytest.raises(WeightsError, match=r"^weights='': give the path of a weights file\.$"):
        read("")


def test_names_in_a_file_are_shown_as_escapes(tmp_path):
    torch.save({"a\nb\x1b[31m": 3}, tmp_path / "odd.pt")
    with pytest.raises(WeightsError) as told:
        read(tmp_path / "odd.pt")
    assert r"(a\nb\x1b[31m)" in str(told.value)
    assert "\x1b" not in str(told.value)
