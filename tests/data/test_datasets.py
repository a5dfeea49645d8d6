"""CIFAR-100 and GTSRB in their real layouts on disk; facts and messages of all data sets."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets, transforms

from bdclean.cli import main
from bdclean.data import CIFAR10, CIFAR100, GTSRB, ImageNet100, Imagenette, TinyImageNet
from bdclean.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---------------------------------------------------------------------- facts and messages


@pytest.mark.parametrize(
    ("cls", "classes", "size", "statistics", "allow_flip"),
    [
        (CIFAR10, 10, 32, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), True),
        (CIFAR100, 100, 32, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), True),
        (GTSRB, 43, 32, ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)), False),
        (TinyImageNet, 200, 64, ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)), True),
        (Imagenette, 10, 224, IMAGENET_STATISTICS, True),
        (ImageNet100, 100, 224, IMAGENET_STATISTICS, True),
    ],
)
def test_facts_are_known_before_there_is_any_data(cls, classes, size, statistics, allow_flip):
    data = cls(root="nowhere")
    assert (data.num_classes, data.input_size) == (classes, size)
    assert (data.mean, data.std) == statistics
    assert data.allow_flip is allow_flip
    assert data.name == cls.__name__.lower()


@pytest.mark.parametrize(
    ("make", "tree"),
    [
        (CIFAR10, ["cifar-10-batches-py"]),
        (CIFAR100, ["cifar-100-python"]),
        (GTSRB, ["gtsrb/GTSRB/Final_Training/Images/00000", "gtsrb/GT-final_test.csv"]),
        (TinyImageNet, ["tiny-imagenet-200/train/WNID/images", "val_annotations.txt"]),
        (lambda root: Imagenette(root, size="320px"), ["imagenette2-320/val/WNID"]),
        (ImageNet100, ["train/WNID", "val/WNID"]),
    ],
)
def test_missing_data_gives_the_key_and_the_tree(tmp_path, make, tree):
    data = make(root=str(tmp_path))
    for read in (data.read_train, data.read_test):
        with pytest.raises(DataError, match=r"^root=") as caught:
            read()
        message = str(caught.value)
        assert all(part in message for part in tree)
        assert f"{tmp_path}/" in message
        assert "{" not in message
        downloads = not isinstance(data, ImageNet100)
        assert ("or set download to true" in message) == downloads


# ---------------------------------------------------------------------- CIFAR-100


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Writes `cifar-100-python` as the original, and tells torchvision its checksums."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def store(name, content):
        path = folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]  # noqa: S324  (torchvision's)

    def part(name, fine):
        pixels = generator.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        labels = {"fine_labels": fine, "coarse_labels": [19] * len(fine)}
        return store(name, {"data": pixels, "filenames": ["x.png"] * len(fine), **labels})

    monkeypatch.setattr(datasets.CIFAR100, "train_list", [part("train", [99, 0, 57])])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [part("test", [3, 42])])
    names = {"fine_label_names": list("ab"), "coarse_label_names": list("cd")}
    name, checksum = store("meta", names)
    meta = {"filename": name, "key": "fine_label_names", "md5": checksum}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    return tmp_path


def test_cifar100_has_the_fine_labels(cifar):
    data = CIFAR100(root=str(cifar))
    assert data.stored.labels.tolist() == [99, 0, 57]
    assert data.test_set.labels.tolist() == [3, 42]
    assert data.stored.classes == ("a", "b")
    stored = pickle.loads((cifar / "cifar-100-python/train").read_bytes())  # noqa: S301
    assert torch.equal(data.stored.images[1], torch.from_numpy(stored["data"][1]).view(3, 32, 32))


def test_a_damaged_cifar100_is_refused(cifar):
    (cifar / "cifar-100-python/test").write_bytes(b"")
    with pytest.raises(DataError, match=r"CIFAR-100.*cifar-100-python.*download to true"):
        _ = CIFAR100(root=str(cifar)).test_set


def test_cifar_downloads_only_when_asked(tmp_path, monkeypatch):
    asked = []

    class Loader(datasets.CIFAR100):
        def __init__(self, root, **settings):
            asked.append((root, settings))
            raise OSError("no network")

    monkeypatch.setattr(CIFAR100, "_loader", Loader)
    CIFAR100(root=str(tmp_path)).prepare_data()
    assert asked == []
    with pytest.raises(DataError, match=r"no network.*\n.*cifar-100-python"):
        CIFAR100(root=str(tmp_path), download=True).prepare_data()
    assert asked == [(str(tmp_path), {"train": True, "download": True})]


# ---------------------------------------------------------------------- GTSRB


@pytest.fixture
def gtsrb(tmp_path, write):
    """The competition's training images as torchvision unpacks them: two per class."""
    folder = tmp_path / "gtsrb"
    for k in range(43):
        for i in range(2):
            name = folder / f"GTSRB/Training/{k:05d}/00000_0000{i}.ppm"
            write(name, 100 + 2 * k + i, size=(24, 40))
        (name.parent / f"GT-{k:05d}.csv").write_text("Filename;Width\n")
    order = [7, 0, 42, 7]
    table = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for i, k in enumerate(order):
        write(folder / f"GTSRB/Final_Test/Images/{i:05d}.ppm", 50 + k)
        table += f"{i:05d}.ppm;12;12;1;1;9;9;{k}\n"
    (folder / "GT-final_test.csv").write_text(table)
    return tmp_path


def add_final_training(root, write):
    for k in range(43):
        for i in range(3):
            name = f"gtsrb/GTSRB/Final_Training/Images/{k:05d}/00000_0000{i}.ppm"
            write(root / name, 60 + k)


def test_gtsrb_is_read_as_torchvision_reads_it(gtsrb):
    data = GTSRB(root=str(gtsrb))
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    for found, split in ((data.stored, "train"), (data.test_set, "test")):
        stored = datasets.GTSRB(str(gtsrb), split, transform=resize)
        assert len(found) == len(stored)
        for i in range(len(stored)):
            image, label = stored[i]
            assert torch.equal(found.images[i], image)
            assert found.labels[i] == label
    assert data.test_set.labels.tolist() == [7, 0, 42, 7]


def test_the_final_training_images_come_first(gtsrb, write, levels):
    add_final_training(gtsrb, write)
    data = GTSRB(root=str(gtsrb))
    assert data.stored.labels.tolist() == [k for k in range(43) for _ in range(3)]
    assert levels(data.stored.images) == [60 + k for k in range(43) for _ in range(3)]
    assert data.describe()["sizes"]["train"] == 129


def test_a_missing_class_does_not_shift_the_others(gtsrb):
    shutil.rmtree(gtsrb / "gtsrb/GTSRB/Training/00011")
    with pytest.raises(DataError, match=r"Training/00011 is missing.*\n.*Final_Training"):
        _ = GTSRB(root=str(gtsrb)).stored
    (gtsrb / "gtsrb/GTSRB/Training/00011").mkdir()
    with pytest.raises(DataError, match="00011 holds no images"):
        _ = GTSRB(root=str(gtsrb)).stored


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (";ClassId\n", "\n", "ClassId"),  # the table of the test archive itself has no labels
        (";", ",", "semicolons"),
        (";42\n", ";x\n", "ClassId"),
        ("00002.ppm", "00009.ppm", r"00009\.ppm is listed but cannot be read"),
    ],
)
def test_a_wrong_table_of_gtsrb_is_refused(gtsrb, old, new, text):
    table = gtsrb / "gtsrb/GT-final_test.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(DataError, match=text):
        _ = GTSRB(root=str(gtsrb)).test_set


def test_gtsrb_downloads_what_is_missing(gtsrb, monkeypatch, write):
    asked = []
    monkeypatch.setattr(
        datasets, "GTSRB", lambda root, split, download: asked.append((split, download))
    )
    shutil.move(gtsrb / "gtsrb/GTSRB/Training", gtsrb / "aside")
    with pytest.raises(DataError, match="00000 is missing"):
        GTSRB(root=str(gtsrb), download=True).prepare_data()
    assert asked == [("train", True), ("test", True)]
    add_final_training(gtsrb, write)
    GTSRB(root=str(gtsrb), download=True).prepare_data()
    assert asked[2:] == [("test", True)]
    GTSRB(root=str(gtsrb)).prepare_data()
    assert len(asked) == 3


def test_one_process_decodes_before_the_others_start(gtsrb, monkeypatch):
    GTSRB(root=str(gtsrb)).prepare_data()
    monkeypatch.setattr("bdclean.data.decoding._decode", lambda *_: pytest.fail("decoded again"))
    data = GTSRB(root=str(gtsrb))
    data.setup("fit")
    data.setup("test")


# ---------------------------------------------------------------------- through the command line


@pytest.mark.filterwarnings("ignore")
def test_a_fit_on_gtsrb(gtsrb, tmp_path):
    names = ("trainer/cpu", "data/gtsrb", "attack/badnets/cbd", "train/supervised/fast")
    words = [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]
    words += ["--data.root", str(gtsrb), "--data.splits.defense", "0", "--data.splits.probe", "0"]
    words += ["--model.width", "4", "--trainer.max_epochs", "1", "--run", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match="weak runs without flips"):
        main(["fit", *words])
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert record["data"]["name"] == "gtsrb"
    assert record["data"]["allow_flip"] is False
    assert record["data"]["sizes"]["train"] == 86
    assert record["metrics"]["n_clean"] == 4


@pytest.mark.filterwarnings("ignore")
def test_missing_data_ends_with_the_message(tmp_path, capsys):
    names = ("trainer/cpu", "data/imagenet100", "train/supervised")
    words = [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]
    words += ["--data.root", str(tmp_path), "--run", str(tmp_path / "run"), "--model.width", "4"]
    with pytest.raises(SystemExit) as caught:
        main(["fit", *words])
    assert caught.value.code == 2
    assert f"{tmp_path}/train/WNID" in capsys.readouterr().err
