"""CIFAR-10 in the layout of its own archive, with a few images of our own."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from bdclean.data import CIFAR10
from bdclean.errors import DataError

PER_FILE = 4


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Writes `cifar-10-batches-py` as the original, and tells torchvision its checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        path = folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]  # noqa: S324  (torchvision's)

    def batch(name):
        data = generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        return write(name, {"data": data, "labels": list(range(PER_FILE))})

    train = [batch(f"data_batch_{i}") for i in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch")])
    name, checksum = write("batches.meta", {"label_names": [str(k) for k in range(10)]})
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def test_the_archive_is_read_in_its_order(archive):
    data = CIFAR10(root=str(archive))
    assert data.stored.images.shape == (5 * PER_FILE, 3, 32, 32)
    assert data.stored.images.dtype == torch.uint8
    assert data.stored.labels.tolist() == list(range(PER_FILE)) * 5
    first = pickle.loads((archive / "cifar-10-batches-py/data_batch_1").read_bytes())  # noqa: S301
    assert torch.equal(data.stored.images[1], torch.from_numpy(first["data"][1]).view(3, 32, 32))
    assert len(data.test_set) == PER_FILE


def test_a_damaged_archive_is_refused(archive):
    (archive / "cifar-10-batches-py/data_batch_3").write_bytes(b"")
    with pytest.raises(DataError, match="download to true"):
        _ = CIFAR10(root=str(archive)).stored
