"""The blur of SimCLR against torchvision, image by image."""

import warnings

import pytest
import torch
import torchvision.transforms.functional as tv

from bdclean.attacks import BadNets, Blend
from bdclean.data import ImageSet
from bdclean.data.augment import augment
from bdclean.data.augment.blur import SIGMA, draw_sigma, gaussian_blur, kernel_size
from bdclean.data.datamodule import ImageDataModule
from bdclean.types import View


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("side", "size"), [(8, 1), (32, 3), (64, 7), (224, 23)])
def test_the_kernel_is_the_odd_number_next_to_a_tenth_of_the_side(side, size):
    assert kernel_size(side) == size


@pytest.mark.parametrize("shape", [(32, 32), (40, 64)])
def test_each_image_is_blurred_as_torchvision_does(shape):
    images = torch.rand(6, 3, *shape, generator=generator())
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.0])
    blurred = gaussian_blur(images, sigma, 7)
    for image, result, s in zip(images[:5], blurred, sigma.tolist(), strict=False):
        torch.testing.assert_close(
            result, tv.gaussian_blur(image, [7, 7], [s, s]), atol=1e-5, rtol=0
        )
    assert torch.equal(blurred[5], images[5])
    assert not torch.allclose(blurred[2], images[2], atol=0.05)


def test_half_of_the_images_get_a_strength_of_their_own():
    sigma = draw_sigma(4000, generator())
    on = sigma[sigma > 0]
    assert 0.47 < len(on) / 4000 < 0.53
    assert on.min() >= SIGMA[0]
    assert on.max() <= SIGMA[1]
    assert on.mean() == pytest.approx(sum(SIGMA) / 2, abs=0.05)


def test_simclr_blur_is_simclr_and_then_the_blur():
    images = torch.rand(16, 3, 32, 32, generator=generator(1))
    g = generator(2)
    plain = augment("simclr", images, g)
    expected = gaussian_blur(plain, draw_sigma(16, g), 3)
    assert torch.equal(augment("simclr_blur", images, generator(2)), expected)
    assert torch.equal(augment("simclr_blur", images, generator(2), blur=False), plain)
    assert not torch.equal(expected, plain)


class Tiny(ImageDataModule):
    name, num_classes, input_size, mean, std = "tiny", 2, 32, (0.5,) * 3, (0.2,) * 3

    def read_train(self):
        images = torch.randint(0, 256, (20, 3, 32, 32), generator=generator())
        return ImageSet(images.to(torch.uint8), torch.arange(20) % 2)

    read_test = read_train


def views_of(attack):
    data = Tiny(attack, shuffle_seed=1)
    data.set_view(View("train", "simclr_blur", views=2, batch_size=20))
    batch = next(iter(data.train_dataloader()))
    image, seed = batch["image"].float() / 255, batch["draw"]
    views = data.on_after_batch_transfer(batch, 0)["views"]
    g = generator(seed)
    sharp = [augment("simclr_blur", image, g, blur=False) for _ in range(2)]
    return views, sharp


def test_noise_is_never_blurred_and_this_is_told():
    attack = Blend(target=1, rate=0.6, rate_base="target_class", label_rule="clean_label")
    with pytest.warns(UserWarning, match="simclr_blur runs without blur, which would"):
        views, sharp = views_of(attack)
    for view, other in zip(views, sharp, strict=True):
        assert torch.equal(view, other)


@pytest.mark.parametrize("attack", [None, BadNets(target=1), Blend(target=1, image="cartoon")])
def test_other_triggers_and_clean_images_are_blurred(attack):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views, sharp = views_of(attack)
    assert not any(torch.equal(view, other) for view, other in zip(views, sharp, strict=True))
