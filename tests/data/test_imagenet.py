"""Tiny-ImageNet, Imagenette and ImageNet-100 in their real layouts on disk."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from bdclean.attacks import BadNets
from bdclean.data import ImageNet100, Imagenette, TinyImageNet
from bdclean.errors import ConfigError, DataError


def close(found, expected):
    """Up to what JPEG changes."""
    return found == pytest.approx(expected, abs=3)


# ---------------------------------------------------------------------- Tiny-ImageNet


WNIDS = [f"n{10_000_000 + 7 * k}" for k in range(200)]


@pytest.fixture
def tiny(tmp_path, write):
    folder = tmp_path / "tiny-imagenet-200"
    for k, wnid in enumerate(WNIDS):
        write(folder / f"train/{wnid}/images/{wnid}_0.JPEG", k, size=(64, 64))
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    (folder / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    rows = []
    for i, k in enumerate([150, 3, 199]):
        mode = "L" if i == 1 else "RGB"  # the archive has greyscale files
        write(folder / f"val/images/val_{i}.JPEG", k, size=(64, 64), mode=mode)
        rows.append(f"val_{i}.JPEG\t{WNIDS[k]}\t0\t32\t44\t62")
    (folder / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    write(folder / "test/images/test_0.JPEG", 5, size=(64, 64))
    return tmp_path


def test_tinyimagenet_in_the_layout_of_its_archive(tiny, levels):
    data = TinyImageNet(root=str(tiny))
    assert data.stored.images.shape == (200, 3, 64, 64)
    assert data.stored.labels.tolist() == list(range(200))
    assert close(levels(data.stored.images), list(range(200)))
    assert data.test_set.labels.tolist() == [150, 3, 199]
    assert close(levels(data.test_set.images), [150, 3, 199])


@pytest.mark.parametrize("inside", ["", "images/"])
def test_tinyimagenet_with_its_validation_images_repacked(tiny, inside, write, levels):
    folder = tiny / "tiny-imagenet-200/val"
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()  # left behind by some scripts, as the table is
    for k, wnid in enumerate(WNIDS):
        write(folder / f"{wnid}/{inside}val_{k}.JPEG", k, size=(64, 64))
    data = TinyImageNet(root=str(tiny))
    assert data.test_set.labels.tolist() == list(range(200))
    assert close(levels(data.test_set.images), list(range(200)))


def test_wrong_layouts_of_tinyimagenet_are_refused(tiny):
    folder = tiny / "tiny-imagenet-200"
    table = folder / "val/val_annotations.txt"
    table.write_text(table.read_text().replace(WNIDS[3], "n99999999"))
    with pytest.raises(DataError, match=r"val_annotations\.txt does not say"):
        _ = TinyImageNet(root=str(tiny)).test_set
    table.unlink()
    with pytest.raises(DataError, match=r"annotations\.txt is missing.*\n.*train/WNID/images"):
        _ = TinyImageNet(root=str(tiny)).test_set
    shutil.rmtree(folder / "train" / WNIDS[0])
    with pytest.raises(DataError, match=r"199 class folders instead of 200.*ImageFolder"):
        _ = TinyImageNet(root=str(tiny)).stored


def test_tinyimagenet_downloads_only_when_asked_and_absent(tiny, monkeypatch):
    asked = []

    def fetch(url, root, md5):
        asked.append((url, root, md5))
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("bdclean.data.tinyimagenet.download_and_extract_archive", fetch)
    TinyImageNet(root=str(tiny), download=True).prepare_data()
    assert asked == []
    elsewhere = str(tiny / "elsewhere")
    with pytest.raises(DataError, match=r"corrupted.*by hand as\n.*elsewhere/tiny-imagenet-200"):
        TinyImageNet(root=elsewhere, download=True).prepare_data()
    ((url, root, md5),) = asked
    assert url.endswith("cs231n.stanford.edu/tiny-imagenet-200.zip")
    assert root == elsewhere
    assert md5 == "90528d7ca1a48142e341f4ef8d21d0de"


# ---------------------------------------------------------------------- Imagenette


NETTE = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
NETTE += ["n03394916", "n03417042", "n03425413", "n03445777", "n03888257"]


@pytest.fixture
def write_nette(tmp_path, write):
    def write_all(folder):
        for part in ("train", "val"):
            for k, wnid in enumerate(NETTE):
                file = tmp_path / folder / part / wnid / f"{wnid}_0.JPEG"
                write(file, 10 + 20 * k, size=(60, 40))

    return write_all


def test_imagenette_is_read_as_torchvision_reads_it(tmp_path, write_nette):
    write_nette("imagenette2-160")
    data = Imagenette(root=str(tmp_path), size="160px", input_size=48)
    assert data.input_size == 48
    resize = transforms.Compose([transforms.Resize((48, 48)), transforms.PILToTensor()])
    for found, split in ((data.stored, "train"), (data.test_set, "val")):
        stored = datasets.Imagenette(str(tmp_path), split, "160px", transform=resize)
        assert found.labels.tolist() == [stored[i][1] for i in range(10)] == list(range(10))
        assert all(torch.equal(found.images[i], stored[i][0]) for i in range(10))
    assert stored.classes[1][0] == "English springer"


@pytest.mark.parametrize(
    ("size", "folder"),
    [("full", "imagenette2"), ("320px", "imagenette2-320"), ("160px", "imagenette2-160")],
)
def test_the_size_picks_the_archive(tmp_path, monkeypatch, size, folder, write_nette):
    asked = []

    def fetch(root, split, size, download):
        asked.append((split, size, download))
        write_nette(folder)

    monkeypatch.setattr(datasets, "Imagenette", fetch)
    data = Imagenette(root=str(tmp_path), size=size, input_size=8, download=True)
    data.prepare_data()
    data.prepare_data()
    assert asked == [("train", size, True)]
    assert len(data.test_set) == 10
    shutil.rmtree(tmp_path / folder / "val" / NETTE[4])
    with pytest.raises(DataError, match=rf"{folder}/val/{NETTE[4]} is missing"):
        data.read_test()


# ---------------------------------------------------------------------- ImageNet-100


@pytest.fixture
def imagenet(tmp_path, write):
    """A folder of more classes than the list names."""
    for part in ("train", "val"):
        for k, wnid in enumerate(["n01440764", "n01820546", "n02018207"]):
            write(tmp_path / part / wnid / f"{wnid}_1.JPEG", 100 + 50 * k, size=(70, 48))
    (tmp_path / "list.txt").write_text("n02018207\nn01820546\n")
    return tmp_path


def test_the_hundred_classes():
    classes = ImageNet100().classes
    assert len(set(classes)) == 100
    assert list(classes) == sorted(classes)
    assert classes[6] == "n01820546"  # the lorikeet, target of CBD
    assert (classes[0], classes[-1]) == ("n01558993", "n13040303")


def test_imagenet_reads_the_listed_classes_in_sorted_order(imagenet, levels):
    data = ImageNet100(str(imagenet), str(imagenet / "list.txt"), input_size=28)
    assert (data.num_classes, data.classes) == (2, ("n01820546", "n02018207"))
    for part in (data.stored, data.test_set):
        assert part.labels.tolist() == [0, 1]
        assert close(levels(part.images), [150, 200])
    with pytest.raises(DataError, match=r"train/n\d+ is missing.*\n.*train/WNID"):
        ImageNet100(str(imagenet)).read_train()


def test_imagenet_images_are_those_of_the_usual_test_pipeline(imagenet):
    noise = np.random.default_rng(0).integers(0, 256, (230, 300, 3), dtype=np.uint8)
    shutil.rmtree(imagenet / "val/n01820546")
    (imagenet / "val/n01820546").mkdir()
    Image.fromarray(noise).save(imagenet / "val/n01820546/a.png")
    Image.fromarray(noise[:224, :224]).save(imagenet / "val/n01820546/b.png")  # resized as well
    data = ImageNet100(str(imagenet), str(imagenet / "list.txt"))
    usual = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    for i, pixels in enumerate((noise, noise[:224, :224])):
        assert torch.equal(data.test_set.images[i], usual(Image.fromarray(pixels)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("lorikeet\nn01820546", "'lorikeet'"), ("n01820546", "two or more"), (None, "cannot be read")],
)
def test_a_wrong_class_list_is_refused(tmp_path, text, message):
    file = tmp_path / "list.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ImageNet100(str(tmp_path), str(file))
    assert str(caught.value).startswith("class_list=")
    file.write_text("n01820546\nn01820546")
    with pytest.raises(ConfigError, match="each once"):
        ImageNet100(str(tmp_path), str(file))


def test_attacks_meet_the_images_at_the_size_of_the_network(imagenet):
    data = ImageNet100(
        str(imagenet),
        str(imagenet / "list.txt"),
        input_size=28,
        attack=BadNets(target=0, rate=1.0),
    )
    images = data.role_images("train", labels=True)[0]["image"]
    assert images.shape == (3, 28, 28)
    assert data.trigger.size == (28, 28)
