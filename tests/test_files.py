"""Files are whole or absent, and what cannot be written is told."""

import errno
import hashlib
import os
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bdclean.callbacks import AtomicCheckpointIO
from bdclean.errors import BdcleanError, FileError, WeightsError
from bdclean.files import (
    leftovers,
    replacing,
    sha256_of_file,
    sha256_of_tensor,
    sweep,
    write_bytes,
    write_text,
)
from bdclean.weights import write


@contextmanager
def full_disk(size=1000):
    """No file can hold more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    write_text(path, "new, and a name that is no UTF-8: \udce9")
    assert path.read_bytes() == b"new, and a name that is no UTF-8: \xe9"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), BdcleanError("why")])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_others_may_read_as_far_as_the_user_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


WRITERS = {
    "bytes": lambda path: write_bytes(path, bytes(5000)),
    "text": lambda path: write_text(path, "x" * 5000),
    "weights": lambda path: write({"w": torch.zeros(5000)}, path, {}),
    "checkpoint": lambda path: AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(5000)}, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, kind):
    path = tmp_path / "file.safetensors"
    with full_disk(), pytest.raises((FileError, WeightsError)) as raised:
        WRITERS[kind](path)
    assert str(raised.value) == f"{path} cannot be written: File too large."
    assert list(tmp_path.iterdir()) == []
    WRITERS[kind](path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_cannot_be_made_is_told(tmp_path, kind):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "deeper.safetensors"
    with pytest.raises((FileError, WeightsError), match=r"deeper\.safetensors cannot be written"):
        WRITERS[kind](path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_hashes_are_those_of_the_content(tmp_path):
    content = bytes(range(6))
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    tensor = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    expected = hashlib.sha256(b"torch.uint8 (2, 3)" + content).hexdigest()
    assert sha256_of_tensor(tensor) == expected  # a key of caches: it stays
    assert sha256_of_tensor(tensor.T.contiguous().T) == expected
    assert sha256_of_tensor(tensor.reshape(3, 2)) != expected
    assert sha256_of_tensor(tensor.char()) != expected


def test_what_killed_processes_left_is_swept(tmp_path):
    left = [".last.ckpt.0a1b2c3d.tmp", ".plan.json.ffffffff.tmp", ".last.ckpt.4711"]
    kept = [".lock", ".notes.tmp", "last.ckpt", ".hidden", "x.0a1b2c3d.tmp", ".a.0a1b2c3dd.tmp"]
    for name in left + kept:
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.0a1b2c3d.tmp").mkdir()
    assert sorted(path.name for path in leftovers(tmp_path)) == sorted(left)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".folder.0a1b2c3d.tmp"}
    sweep(tmp_path / "nowhere")


def test_a_full_disk_is_told_with_what_is_missing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
    with pytest.raises(FileError) as told:
        write_bytes(tmp_path / "x", bytes(5000))
    said = f"{tmp_path / 'x'} cannot be written: No space left on device."
    assert str(told.value) == f"{said} It has 5,000 bytes, and 1,234 bytes are free there."
    with pytest.raises(FileError) as told, replacing(tmp_path / "x"):
        pass
    assert str(told.value) == f"{said} 1,234 bytes are free there."
    assert list(tmp_path.iterdir()) == []
