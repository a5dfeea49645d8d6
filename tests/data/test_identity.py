"""What tells the images of a run from others."""

import os
import time

import pytest
import torch
from PIL import Image

from bdclean.attacks import BadNets
from bdclean.data import Digits, ImageFolder, Splits
from bdclean.data.decoding import Reading
from bdclean.data.identity import identity
from bdclean.data.images import ImageSet
from bdclean.data.sources import read_class_folder


@pytest.fixture(params=["png", "bmp"])
def folder(tmp_path, request):
    """Two classes of three images; in BMP, files of one size have pictures of one size."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            pixels = torch.full((8, 8, 3), 60 * k + 20 * i, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "set" / name / f"{i}.{request.param}")
    return tmp_path / "set"


def of(folder):
    return identity(read_class_folder(folder, 8, reading=Reading(cache=False)))


def test_files_are_their_names_sizes_and_classes(folder, tmp_path):
    before = of(folder)
    assert before.startswith("6 images, ")
    first = sorted(folder.glob("cat/*"))[0]
    os.utime(first, (1, 1))
    moved = folder.rename(tmp_path / "moved")
    assert of(moved) == before
    first = sorted(moved.glob("cat/*"))[0]
    content = first.read_bytes()
    Image.effect_noise((8, 8), 50).convert("RGB").save(first)
    changed = of(moved)
    first.write_bytes(content)
    first.rename(first.with_stem("renamed"))
    renamed = of(moved)
    first.with_stem("renamed").unlink()
    fewer = of(moved)
    assert len({before, changed, renamed, fewer}) == 4
    assert fewer.startswith("5 images, ")


def test_numbers_are_hashed_themselves():
    images = torch.randint(0, 255, (100, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(100) % 4
    before = identity(ImageSet(images, labels))
    assert identity(ImageSet(images.clone(), labels.clone())) == before
    other = images.clone()
    other[57, 1, 3, 3] += 1
    swapped = labels.clone()
    swapped[:2] = swapped[:2].flip(0)
    found = {identity(ImageSet(i, t)) for i, t in ((other, labels), (images, swapped))}
    assert len(found | {before, identity(ImageSet(images, None))}) == 4


def test_of_many_images_every_so_manieth_is_read(monkeypatch):
    images = torch.zeros(1000, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr("bdclean.data.identity._LARGEST", 192 * 100)
    before = identity(ImageSet(images, None))
    images[1] = 1  # not among them
    assert identity(ImageSet(images, None)) == before
    images[990] = 1
    assert identity(ImageSet(images, None)) != before


def test_fifty_thousand_images_take_less_than_a_second():
    images = ImageSet(torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8), torch.zeros(50_000))
    seconds = []
    for _ in range(3):  # the machine may be busy
        begin = time.perf_counter()
        identity(images)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1


def test_a_data_module_names_what_a_fit_reads(folder):
    splits = Splits(defense=300, probe=100)
    plain = Digits(splits=splits).identity()
    assert set(plain) == {"training images"}
    poisoned = Digits(splits=splits, attack=BadNets(target=6, rate=0.06)).identity()
    again = Digits(splits=splits, attack=BadNets(target=6, rate=0.06, seed=3)).identity()
    assert set(poisoned) == {"training images", "poison plan"}
    assert poisoned["training images"] == plain["training images"]
    assert poisoned["poison plan"] != again["poison plan"]
    photos = ImageFolder(num_classes=2, input_size=8, defense_root=str(folder), cache=False)
    assert set(photos.identity()) == {"defence images"}
