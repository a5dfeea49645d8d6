"""Batched augmentation against torchvision, image by image, with the same parameters."""

import itertools
import math
from typing import Any, get_args

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode

from bdclean.data.augment import RECIPES, Augmentation, augment, colour, geometry
from bdclean.data.augment.geometry import Boxes
from bdclean.data.views import ViewMaker
from bdclean.errors import ConfigError, DataError
from bdclean.types import AugmentationName, View

NAMES = ("none", "crop", "weak", "simclr", "simclr_blur", "imagenet", "wanet", "physical")
RANDOM_NAMES = NAMES[1:]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(batch: int, height: int = 32, width: int = 32, seed: int = 1) -> Tensor:
    """Random colours, with gray, saturated, black and white pixels among them."""
    images = torch.rand(batch, 3, height, width, generator=_generator(seed))
    images[:, :, 0] = images[:, :1, 0]  # gray row: hue undefined
    images[:, :, 1] = images[:, :, 1].round()  # corners of the RGB cube
    images[:, 1, 2] = images[:, 0, 2]  # ties between channels
    images[:, 2, 3] = images[:, 1, 3]
    return images


def _pad_crop_oracle(image: Tensor, top: int, left: int, mirror: bool) -> Tensor:
    height, width = image.shape[-2:]
    cut = tv.crop(tv.pad(image, [4]), top, left, height, width)
    return tv.hflip(cut) if mirror else cut


def _color_oracle(image: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    brightness, contrast, saturation, hue = factors.tolist()
    for op in order.tolist():
        if op == 0:
            image = tv.adjust_brightness(image, brightness)
        elif op == 1:
            image = tv.adjust_contrast(image, contrast)
        elif op == 2:
            image = tv.adjust_saturation(image, saturation)
        else:
            image = tv.adjust_hue(image, hue)
    return image


def _crop_oracle(
    image: Tensor,
    boxes: Boxes,
    row: int,
    mirror: bool,
    mode: InterpolationMode = InterpolationMode.BICUBIC,
) -> Tensor:
    top, left, height, width = (int(field[row]) for field in boxes)
    size = list(image.shape[-2:])
    cut = tv.resized_crop(image, top, left, height, width, size, mode, antialias=True)
    cut = cut.clamp(0, 1)
    return tv.hflip(cut) if mirror else cut


# --- each operation against torchvision ---


def test_pad_crop_is_bit_equal_to_torchvision_at_every_offset() -> None:
    offsets = torch.tensor(list(itertools.product(range(9), range(9), (0, 1))))
    images = _images(len(offsets), 12, 10)
    result = geometry.pad_crop(images, offsets[:, 0], offsets[:, 1], offsets[:, 2].bool())
    for image, found, (top, left, mirror) in zip(images, result, offsets.tolist(), strict=True):
        assert torch.equal(found, _pad_crop_oracle(image, top, left, bool(mirror)))


KERNELS = [
    (geometry.CATMULL_ROM, InterpolationMode.BICUBIC),
    (geometry.LINEAR, InterpolationMode.BILINEAR),
]


@pytest.mark.parametrize(("kernel", "mode"), KERNELS, ids=["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (20, 33), (3, 3), (64, 48)])
def test_resized_crop_equals_torchvision(
    size: tuple[int, int], kernel: geometry.Kernel, mode: InterpolationMode
) -> None:
    images = _images(64, *size) if min(size) > 3 else torch.rand(64, 3, *size)
    boxes = geometry.draw_boxes(64, *size, _generator(2), (0.08, 1.0))
    mirror = torch.arange(64) % 2 == 0
    result = geometry.resized_crop(images, boxes, mirror, kernel)
    for row, image in enumerate(images):
        expected = _crop_oracle(image, boxes, row, bool(mirror[row]), mode)
        torch.testing.assert_close(result[row], expected, atol=1e-5, rtol=0)


def test_resized_crop_of_the_whole_image_and_of_single_pixels() -> None:
    images = _images(2)
    boxes = Boxes(*torch.tensor([[0, 5], [0, 31], [32, 1], [32, 1]]))
    result = geometry.resized_crop(images, boxes, torch.tensor([False, False]))
    torch.testing.assert_close(result[0], images[0], atol=1e-6, rtol=0)
    pixel = images[1, :, 5, 31, None, None].expand(3, 32, 32)
    torch.testing.assert_close(result[1], pixel, atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_blend_equals_torchvision(factor: float) -> None:
    images, zero, one = _images(3), torch.zeros(3), torch.ones(3)
    keep, rest = one * factor, one * (1 - factor)
    cases = [
        ((keep, zero, zero), tv.adjust_brightness(images, factor)),
        ((keep, zero, rest), tv.adjust_contrast(images, factor)),
        ((keep, rest, zero), tv.adjust_saturation(images, factor)),
        ((zero, one, zero), tv.rgb_to_grayscale(images, 3)),
    ]
    for weights, expected in cases:
        result = colour.blend_(images.clone(), *weights)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_identity_blend_changes_no_bit() -> None:
    images = _images(2)
    result = colour.blend_(images.clone(), torch.ones(2), torch.zeros(2), torch.zeros(2))
    assert torch.equal(result, images)


def test_hue_equals_torchvision_around_the_circle() -> None:
    turns = torch.linspace(-0.5, 0.5, 41)
    images = _images(41)
    result = colour.shift_hue_(images.clone(), turns)
    for image, found, shift in zip(images, result, turns.tolist(), strict=True):
        torch.testing.assert_close(found, tv.adjust_hue(image, shift), atol=1e-4, rtol=0)


def test_hue_of_all_8_bit_corner_colours_stays_close() -> None:
    levels = torch.tensor([0, 1, 2, 127, 128, 253, 254, 255]) / 255
    images = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 16, 32)
    result = colour.shift_hue_(images.clone(), torch.tensor([0.07]))
    torch.testing.assert_close(result, tv.adjust_hue(images, 0.07), atol=1e-4, rtol=0)


def test_jitter_equals_torchvision_in_all_24_orders() -> None:
    order = torch.tensor(list(itertools.permutations(range(4))))
    images = _images(24)
    factors, _ = colour.draw_factors(24, _generator(5))
    factors[0] = torch.tensor([1.4, 0.6, 1.4, 0.1])
    result = colour.color_jitter_(images.clone(), factors, order)
    for row in range(24):
        expected = _color_oracle(images[row], factors[row], order[row])
        torch.testing.assert_close(result[row], expected, atol=1e-4, rtol=0)


def test_order_matters_so_the_oracle_can_fail() -> None:
    image = _images(1)[0]
    factors = torch.tensor([1.4, 0.6, 1.4, 0.1])
    results = [_color_oracle(image, factors, torch.tensor(o)) for o in ([0, 1, 2, 3], [3, 2, 1, 0])]
    assert (results[0] - results[1]).abs().max() > 0.05


def test_simclr_composes_the_operations_in_torchvisions_order() -> None:
    images = _images(32)
    result = augment("simclr", images, _generator(9))
    g = _generator(9)
    boxes = geometry.draw_boxes(32, 32, 32, g)
    mirror = torch.rand(32, generator=g) < 0.5
    factors, order = colour.draw_factors(32, g)
    gray = torch.rand(32, generator=g) < 0.2
    assert gray.any()
    assert not gray.all()
    for row in range(32):
        expected = _crop_oracle(images[row], boxes, row, bool(mirror[row]))
        expected = _color_oracle(expected, factors[row], order[row])
        if gray[row]:
            expected = tv.rgb_to_grayscale(expected, 3)
        torch.testing.assert_close(result[row], expected, atol=1e-4, rtol=0)


# --- randomness ---


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_deterministic_in_the_generator_alone(name: str) -> None:
    images = _images(8)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = augment(name, images, _generator(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(augment(name, images, _generator(3)), first)
    assert not torch.equal(augment(name, images, _generator(4)), first)


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_the_generator_moves_on_by_the_same_count_whatever_is_drawn(name: str) -> None:
    states = []
    for height, width in ((32, 32), (8, 32)):  # 8 x 32: many rejected windows
        g = _generator(3)
        augment(name, torch.rand(8, 3, height, width), g)
        states.append(g.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_images_of_a_batch_get_parameters_of_their_own(name: str) -> None:
    images = _images(1).expand(64, -1, -1, -1)
    result = augment(name, images, _generator())
    distinct = len(torch.unique(result.flatten(1), dim=0))
    expected = {"crop": 81 * (1 - (80 / 81) ** 64), "weak": 162 * (1 - (161 / 162) ** 64)}
    expected |= {"wanet": 54}  # one image in ten stays as it is
    assert distinct == pytest.approx(expected.get(name, 64), abs=8 if name != "simclr" else 0)


def test_the_jitter_order_is_a_uniform_permutation_per_image() -> None:
    _, order = colour.draw_factors(24_000, _generator())
    _, counts = torch.unique(order, dim=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 1000 - 5 * math.sqrt(1000)
    assert counts.max() < 1000 + 5 * math.sqrt(1000)


def test_jitter_rate_and_ranges() -> None:
    factors, _ = colour.draw_factors(20_000, _generator())
    neutral = (factors == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1)
    assert neutral.float().mean().item() == pytest.approx(0.2, abs=0.015)
    used = factors[~neutral]
    bounds = torch.tensor([[0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1]])
    assert (used >= bounds[0]).all()
    assert (used <= bounds[1]).all()
    torch.testing.assert_close(used.aminmax(dim=0).min, bounds[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(used.aminmax(dim=0).max, bounds[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (12, 40)])
@pytest.mark.parametrize("share", [(0.2, 1.0), (0.08, 1.0)])
def test_crop_windows_equal_torchvisions_loop_on_the_same_numbers(
    height: int, width: int, share: tuple[float, float]
) -> None:
    boxes = geometry.draw_boxes(200, height, width, _generator(3), share)
    g = _generator(3)
    scale = torch.empty(200, 10).uniform_(*share, generator=g)
    log_ratio = torch.empty(200, 10).uniform_(math.log(3 / 4), math.log(4 / 3), generator=g)
    corner = torch.rand(2, 200, generator=g)
    rejected = 0
    for row in range(200):
        for area, log in zip(scale[row].tolist(), log_ratio[row].tolist(), strict=True):
            w = round(math.sqrt(area * height * width * math.exp(log)))
            h = round(math.sqrt(area * height * width / math.exp(log)))
            if 0 < w <= width and 0 < h <= height:
                i = int(corner[0, row].item() * (height - h + 1))
                j = int(corner[1, row].item() * (width - w + 1))
                assert [int(field[row]) for field in boxes] == [i, j, h, w]
                break
            rejected += 1
    assert rejected > 0


def test_crop_windows_follow_torchvisions_distribution() -> None:
    boxes = geometry.draw_boxes(20_000, 224, 224, _generator())
    area = boxes.height * boxes.width / 224**2
    ratio = boxes.width / boxes.height
    assert area.min() > 0.195
    assert area.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.36
    # uniform area but for windows too large to fit: below (3/4 of the area) nothing is rejected
    small = ((area < 0.45).sum() / (area < 0.7).sum()).item()
    assert small == pytest.approx(0.5, abs=0.02)
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.01)
    room = 224 - boxes.height
    placed = (boxes.top / room)[room > 50]
    assert placed.min() == 0
    assert placed.max() == 1
    assert placed.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("size", "expected"), [((40, 8), (11, 8)), ((8, 40), (8, 11))])
def test_windows_that_never_fit_fall_back_to_the_centre(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    height, width = size
    boxes = geometry.draw_boxes(2000, height, width, _generator())
    assert (boxes.top + boxes.height <= height).all()
    assert (boxes.left + boxes.width <= width).all()
    found = set(zip(*(field.tolist() for field in boxes), strict=True))
    centre = ((height - expected[0]) // 2, (width - expected[1]) // 2, *expected)
    assert centre in found


def test_flip_rate() -> None:
    images = torch.zeros(4000, 3, 8, 32)
    images[..., :16] = 1  # after any shift of up to 4 pixels the brighter half tells the side
    flipped = {
        name: torch.gt(*(half.mean((1, 2, 3)) for half in result.chunk(2, dim=3)[::-1]))
        for name in ("crop", "weak")
        for result in [augment(name, images, _generator())]
    }
    assert flipped["weak"].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not flipped["crop"].any()


def test_a_corner_patch_survives_25_of_81_crops() -> None:
    """BadNets' 3x3 corner patch: whole only if both offsets keep it, (5/9)^2 of pad-4 crops."""
    images = torch.zeros(5000, 3, 16, 16)
    images[:, :, -3:, -3:] = 1
    result = augment("crop", images, _generator())
    whole = (result.sum((1, 2, 3)) == 27).float().mean().item()
    assert whole == pytest.approx(25 / 81, abs=0.025)
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    mirror = torch.zeros(81, dtype=torch.bool)
    result = geometry.pad_crop(images[:81], grid[:, 0], grid[:, 1], mirror)
    assert (result.sum((1, 2, 3)) == 27).sum() == 25


def test_gray_rate() -> None:
    result = augment("simclr", _images(3000, 8, 8), _generator())
    gray = (result.amax(1) - result.amin(1)).amax((1, 2)) == 0
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.03)


# --- contract ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (5, 9), (1, 1), (96, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_range_and_input_untouched(
    name: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    images = torch.rand(6, 3, *size).to(dtype)
    before = images.clone()
    result = augment(name, images, _generator())
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", NAMES)
def test_memory_format_is_kept_and_changes_nothing(name: str) -> None:
    images = _images(4, 16, 12)
    last = images.contiguous(memory_format=torch.channels_last)
    plain_result = augment(name, images, _generator())
    last_result = augment(name, last, _generator())
    assert plain_result.is_contiguous()
    assert last_result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain_result, last_result)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_none_and_of_one(name: str) -> None:
    for batch in (0, 1):
        assert augment(name, torch.rand(batch, 3, 8, 8), _generator()).shape == (batch, 3, 8, 8)


def test_autocast_does_not_coarsen_the_interpolation() -> None:
    images = _images(4)
    expected = augment("simclr", images, _generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment("simclr", images, _generator()), expected)


def test_no_gradient_is_recorded() -> None:
    images = _images(2).requires_grad_()
    assert not augment("simclr", images, _generator()).requires_grad


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for an accelerator: reading values, sizes that depend on
    values, and constants copied from the host (`lift_fresh` is `torch.tensor`)."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(word in str(func) for word in self.forbidden):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: str) -> None:
    images = _images(4)
    with _NoWaiting():
        augment(name, images, _generator())
    with pytest.raises(AssertionError, match="waits"), _NoWaiting():
        images.max().item()


def test_wrong_input_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"=strong: .* none, crop, weak, simclr, simclr_blur"):
        augment("strong", _images(1), _generator())  # type: ignore[arg-type]
    for images in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8).byte()):
        with pytest.raises(DataError, match=r"float images of shape \(B, 3, H, W\)"):
            augment("weak", images, _generator())


# --- one entry a name ---


def test_every_name_that_a_config_may_give_has_an_entry() -> None:
    assert tuple(RECIPES) == get_args(AugmentationName)


def test_a_new_augmentation_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def darker(images: Tensor, generator: torch.Generator, flip_rate: float) -> Tensor:
        mirror = torch.rand(len(images), generator=generator) < flip_rate
        return torch.where(mirror[:, None, None, None], images.flip(3), images) / 2

    monkeypatch.setitem(RECIPES, "darker", Augmentation(darker, flips=True))  # type: ignore[misc]
    images = _images(16)
    upright = augment("darker", images, _generator(), flip=False)  # type: ignore[arg-type]
    assert torch.equal(upright, images / 2)
    flipped = augment("darker", images, _generator())  # type: ignore[arg-type]
    assert not torch.equal(flipped, upright)
    maker = ViewMaker("signs", flip=False, blur=True)
    with pytest.warns(UserWarning, match="Augmentation darker runs without flips: .* of signs"):
        maker.warn_once(View("train", "darker"))  # type: ignore[arg-type]
    (view,) = maker(View("train", "darker"), images, _generator())  # type: ignore[arg-type]
    assert torch.equal(view, upright)


def test_a_view_of_an_unknown_name_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ConfigError, match="augmentation=strong"):
        ViewMaker("digits", flip=True, blur=True).warn_once(View("train", "strong"))  # type: ignore[arg-type]
