"""The augmentation of ImageNet, and data sets whose images must not be mirrored."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from bdclean.data import GTSRB, ImageFolder
from bdclean.data.augment import RECIPES, augment, colour, geometry
from bdclean.data.images import ImageSet
from bdclean.types import View


def generator(seed=9):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return torch.rand(64, 3, 32, 32, generator=generator(1))


@pytest.mark.parametrize("flip", [True, False])
def test_imagenet_is_torchvisions_random_resized_crop_and_flip(images, flip):
    result = augment("imagenet", images, generator(), flip=flip)
    usual, g = RandomResizedCrop(32), generator()
    boxes = geometry.draw_boxes(64, 32, 32, g, usual.scale)
    mirror = (torch.rand(64, generator=g) < 0.5) & flip
    assert mirror.any() == flip
    for row, image in enumerate(images):
        box = [int(field[row]) for field in boxes]
        expected = tv.resized_crop(image, *box, usual.size, usual.interpolation, usual.antialias)
        expected = tv.hflip(expected) if mirror[row] else expected
        torch.testing.assert_close(result[row], expected, atol=1e-5, rtol=0)


def test_without_flips_all_else_is_drawn_the_same(images):
    weak = augment("weak", images, generator(), flip=False)
    assert torch.equal(weak, augment("crop", images, generator()))
    g, upright = generator(), torch.zeros(64, dtype=torch.bool)
    boxes = geometry.draw_boxes(64, 32, 32, g)
    torch.rand(64, generator=g)
    factors, order = colour.draw_factors(64, g)
    gray = (torch.rand(64, generator=g) < 0.2).float()
    expected = geometry.resized_crop(images, boxes, upright)
    expected = colour.color_jitter_(expected, factors, order)
    expected = colour.blend_(expected, 1 - gray, gray, torch.zeros(64))
    assert torch.equal(augment("simclr", images, generator(), flip=False), expected)


@pytest.mark.parametrize("name", ["none", "crop", "weak", "simclr", "imagenet"])
def test_the_names_that_flip_are_known(images, name):
    both = [augment(name, images, generator(), flip=flip) for flip in (True, False)]
    assert torch.equal(*both) == (not RECIPES[name].flips)


# ---------------------------------------------------------------------- data modules


def augmented(data, name, views=0):
    """One training batch of the whole training role, before and after."""
    data.set_view(View("train", name, views, batch_size=10_000))
    (batch,) = data.train_dataloader()
    stored, draw = batch["image"].float() / 255, batch["draw"]
    return stored, data.on_after_batch_transfer(batch, 0), generator(draw)


class Signs(GTSRB):
    def read_train(self):
        pixels = torch.randint(0, 256, (86, 3, 32, 32), generator=generator(2))
        return ImageSet(pixels.to(torch.uint8), torch.arange(86) % 43)


def test_gtsrb_is_never_flipped():
    data = Signs()
    assert data.view.augmentation == "crop"
    augmented(data, "crop")
    with pytest.warns(UserWarning, match="weak runs without flips: images of gtsrb must not be"):
        stored, batch, draws = augmented(data, "weak")
    assert torch.equal(batch["image"], augment("crop", stored, draws))
    for name in ("simclr", "imagenet"):  # told once
        stored, batch, draws = augmented(data, name, views=2)
        assert len(batch["views"]) == 2
        for view in batch["views"]:
            assert torch.equal(view, augment(name, stored, draws, flip=False))


def test_a_folder_may_forbid_flips(tmp_path, write):
    def on_the_right(data):
        """How many of the pictures, black on their left, still are."""
        left, right = augmented(data, "weak")[1]["image"].chunk(2, dim=3)
        return (right.mean((1, 2, 3)) > left.mean((1, 2, 3))).sum()

    for i in range(16):
        write(tmp_path / f"train/stop/{i}.png", 200, size=(32, 32))
    assert 0 < on_the_right(ImageFolder(root=str(tmp_path))) < 16
    data = ImageFolder(root=str(tmp_path), allow_flip=False)
    with pytest.warns(UserWarning, match="without flips: images of folder must not"):
        assert on_the_right(data) == 16
    assert data.describe()["allow_flip"] is False
