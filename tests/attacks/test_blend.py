"""Blend against its formula, and the pictures it mixes in."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.attacks import Blend, Trigger, assets
from bdclean.errors import AttackError


def floats() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("image", ["noise", "noise_gauss", "cartoon"])
def test_formula(image):
    trigger = Blend(alpha=0.2, image=image).make_trigger((32, 32))
    x, t = floats(), trigger.picture
    out = trigger(x)
    assert torch.allclose(out, (1 - 0.2) * x + 0.2 * t, atol=1e-6)
    assert torch.allclose((out - 0.8 * x) / 0.2, t.expand_as(x), atol=1e-6)
    assert (out - x).abs().max() <= 0.2 + 1e-6


def test_twice_is_not_once():
    trigger = Blend(alpha=0.2).make_trigger((32, 32))
    x = floats()
    twice = trigger(trigger(x))
    assert torch.allclose(twice, 0.64 * x + 0.36 * trigger.picture, atol=1e-6)
    assert not torch.allclose(twice, trigger(x), atol=1e-3)


def test_alpha_zero_is_the_image_and_one_the_picture():
    x = floats()
    assert torch.equal(Blend(alpha=0.0).make_trigger((32, 32))(x), x)
    trigger = Blend(alpha=1.0).make_trigger((32, 32))
    assert torch.equal(trigger(x), trigger.picture.expand_as(x))


def test_psnr_of_uniform_noise_is_that_of_theory():
    # E (x - t)^2 = var t + var x + (mean x - mean t)^2; CIFAR-10 has var x = 0.0633 or so
    generator = torch.Generator().manual_seed(0)
    x = (0.473 + math.sqrt(0.0633) * torch.randn(64, 3, 32, 32, generator=generator)).clamp(0, 1)
    out = Blend(alpha=0.2).make_trigger((32, 32))(x)
    psnr = 10 * torch.log10(1 / (out - x).pow(2).mean(dim=(1, 2, 3)))
    assert psnr.mean().item() == pytest.approx(22.3, abs=0.5)


@pytest.mark.parametrize("size", [32, 224])
def test_uniform_noise(size):
    noise = assets.noise_uniform((size, size), seed=0)
    assert torch.equal((noise * 255).round() / 255, noise)
    assert noise.min() >= 0
    assert noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert noise.std().item() == pytest.approx(0.289, abs=0.01)
    centred = noise - noise.mean()
    lag = (centred[..., 1:] * centred[..., :-1]).mean() / centred.pow(2).mean()
    assert abs(lag.item()) < 0.05
    assert torch.equal(noise, assets.noise_uniform((size, size), seed=0))
    assert not torch.equal(noise, assets.noise_uniform((size, size), seed=1))
    channels = torch.corrcoef(noise.flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 0.1


def test_gaussian_noise():
    noise = assets.noise_gauss((64, 64), seed=0, mean=0.5, std=0.1)
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(0.1, abs=0.005)
    wide = assets.noise_gauss((64, 64), seed=0)
    assert wide.min() == 0
    assert wide.max() == 1
    unclipped = wide[(wide > 0) & (wide < 1)]
    assert 0.07 < 1 - len(unclipped) / wide.numel() < 0.10  # P(|N| > 0.5 / 0.29) = 0.085


def test_image_seed_is_not_the_seed_of_the_selection():
    base = Blend().make_trigger((32, 32)).picture
    assert torch.equal(Blend(seed=5).make_trigger((32, 32)).picture, base)
    assert not torch.equal(Blend(image_seed=5).make_trigger((32, 32)).picture, base)


def test_cartoon_has_the_published_statistics():
    picture = assets.cartoon_balloon((32, 32))
    assert picture.mean((1, 2)).tolist() == pytest.approx([0.776, 0.672, 0.456], abs=0.015)
    assert picture.std((1, 2)).tolist() == pytest.approx([0.294, 0.198, 0.275], abs=0.015)
    grey = picture.mean(0)
    power = torch.fft.fft2(grey - grey.mean()).abs().pow(2)
    cycles = torch.fft.fftfreq(32) * 32
    low = (cycles[:, None].square() + cycles[None].square()).sqrt() <= 4
    assert (power[low].sum() / power.sum()).item() == pytest.approx(0.53, abs=0.05)


def test_cartoon_shows_a_balloon_on_a_wall():
    picture = assets.cartoon_balloon((64, 64))
    assert picture[:, 1, 1].tolist() == pytest.approx([1, 0.66, 0.5])  # wall
    assert picture[:, 62, 1].tolist() == pytest.approx([0.35, 0.62, 0.30])  # ground
    assert picture[:, 16, 32].tolist() == pytest.approx([1, 0.84, 0.08])  # middle stripe
    assert picture[:, 25, 32].tolist() == pytest.approx([0.12, 0.50, 0.62])  # band
    assert picture[:, 55, 32].tolist() == pytest.approx([0.62, 0.38, 0.16])  # basket
    coarse = torch.nn.functional.avg_pool2d(picture[None], 2)[0]
    assert torch.allclose(coarse, assets.cartoon_balloon((32, 32)), atol=0.13)


def write(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def test_a_file_of_the_right_size_is_taken_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    path = write(tmp_path / "own.png", pixels)
    trigger = Blend(image=f"file:{path}").make_trigger((32, 32))
    assert torch.equal(
        (trigger.picture * 255).round().long(), torch.tensor(pixels).permute(2, 0, 1)
    )
    assert (trigger.mask == 1).all()


def test_a_larger_file_is_resized_with_antialiasing(tmp_path):
    checkered = np.indices((256, 256)).sum(0) % 2 * 255  # fine enough to alias
    path = write(tmp_path / "grey.png", checkered)
    picture = Blend(image=f"file:{path}").make_trigger((32, 32)).picture
    assert picture.shape == (3, 32, 32)
    assert (picture - 0.5).abs().max() < 0.01


def test_the_alpha_channel_is_the_mask(tmp_path):
    pixels = np.full((32, 32, 4), 255)
    pixels[:16, :, 3] = 0
    path = write(tmp_path / "half.png", pixels)
    trigger = Blend(alpha=0.5, image=f"file:{path}").make_trigger((32, 32))
    x = floats()
    out = trigger(x)
    assert torch.equal(out[:, :, :16], x[:, :, :16])
    assert torch.allclose(out[:, :, 16:], 0.5 * x[:, :, 16:] + 0.5)


def test_the_saved_trigger_needs_no_file_and_names_no_folder(tmp_path):
    picture = write(tmp_path / "own.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3)))
    attack = Blend(image=f"file:{picture}")
    trigger = attack.make_trigger((32, 32))
    saved = tmp_path / "trigger.safetensors"
    trigger.save(saved)
    picture.unlink()
    assert Trigger.load(saved).fingerprint == trigger.fingerprint
    assert attack.describe()["image"] == "file:own.png"
    for text in (saved.read_bytes(), json.dumps(attack.describe()).encode()):
        assert str(tmp_path).encode() not in text


def test_a_missing_or_broken_file_is_one_clear_error(tmp_path):
    missing = tmp_path / "no.png"
    with pytest.raises(AttackError, match=r"^image=file:.*no\.png: it cannot be"):
        Blend(image=f"file:{missing}").make_trigger((32, 32))
    with pytest.raises(AttackError, match="cannot be read as a picture"):
        Blend(image=f"file:{tmp_path}").make_trigger((32, 32))
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    with pytest.raises(AttackError, match="give the path of a PNG or JPEG file"):
        Blend(image=f"file:{broken}").make_trigger((32, 32))
