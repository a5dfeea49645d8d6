"""SIG against its formula and golden numbers."""

import math

import pytest
import torch

from bdclean.attacks import SIG

GOLDEN = [0, 18.478, 14.142, -7.654, -20, -7.654, 14.142, 18.478, 0]


def floats() -> torch.Tensor:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0], images[1] = 0.0, 1.0
    return images


def v(j: int, delta: float = 20, f: float = 6, width: int = 32) -> float:
    return delta / 255 * math.sin(2 * math.pi * f * j / width)


def by_columns(formula):
    """Applies formula(x, j) column by column, a literal transcription."""
    x = floats().double()
    out = torch.stack([formula(x[..., j], j) for j in range(32)], dim=-1)
    return out.clamp(0, 1).float()


def test_signal_has_the_golden_values():
    signal = SIG(delta=20, frequency=6).make_trigger((32, 32)).signal
    assert signal.shape == (1, 1, 32)
    levels = signal.double().flatten() * 255
    assert levels[:9].tolist() == pytest.approx(GOLDEN, abs=6e-4)
    assert torch.allclose(levels[8:], -levels[:-8], atol=1e-5)
    assert torch.allclose(levels[16:], levels[:-16], atol=1e-5)
    assert levels.sum().abs() < 1e-4
    assert torch.fft.rfft(levels).abs().argmax() == 6


def test_rows_and_channels_get_the_same_signal():
    added = SIG().make_trigger((32, 32))(torch.full((3, 32, 32), 0.5)) - 0.5
    assert torch.equal(added, added[:1, :1].expand(3, 32, 32))
    assert added[0, 0].tolist() == pytest.approx([v(j) for j in range(32)], abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "alpha", "formula"),
    [
        ("additive", None, lambda x, j: x + v(j)),
        ("convex", 0.3, lambda x, j: 0.7 * x + 0.3 * v(j)),
        ("bench_v1", 0.3, lambda x, j: 0.3 * x + 0.7 * v(j)),
        ("mask_image", 0.2, lambda x, j: 0.8 * x + 0.2 * (math.trunc(v(j) * 255) % 256) / 255),
    ],
)
def test_variants_are_their_formulas(variant, alpha, formula):
    trigger = SIG(variant=variant, alpha=alpha).make_trigger((32, 32))
    assert torch.allclose(trigger(floats()), by_columns(formula), atol=1e-6)


def test_mask_image_wraps_negative_values_around():
    levels = SIG(variant="mask_image", alpha=0.2).make_trigger((32, 32)).signal.flatten() * 255
    assert levels[:9].round().long().tolist() == [0, 18, 14, 249, 236, 249, 14, 18, 0]


@pytest.mark.parametrize("delta", [20, 30, 40, 60])
def test_additive_stays_within_delta(delta):
    x = floats()
    out = SIG(delta=delta).make_trigger((32, 32))(x)
    assert (out - x).abs().max() <= delta / 255 + 1e-6
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize(("delta", "bound"), [(20, 25.12), (30, 21.60), (40, 19.10), (60, 15.58)])
def test_psnr(delta, bound):
    trigger = SIG(delta=delta).make_trigger((32, 32))

    def psnr(images: torch.Tensor) -> torch.Tensor:
        return 10 * torch.log10(1 / (trigger(images) - images).pow(2).mean(dim=(1, 2, 3)))

    assert psnr(torch.full((1, 3, 32, 32), 128 / 255)).item() == pytest.approx(bound, abs=0.006)
    assert (psnr(floats()) >= bound - 0.006).all()


def test_grey_floored_and_rounded():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    floored = SIG(quantize="floor").make_trigger((32, 32)).poison(grey)
    assert floored[0, 0, :8].tolist() == [128, 146, 142, 120, 108, 120, 142, 146]
    rounded = SIG(quantize="round").make_trigger((32, 32)).poison(grey)
    assert rounded[0, 0, :8].tolist() == [128, 146, 142, 120, 108, 120, 142, 146]
    forty = SIG(delta=40).make_trigger((32, 32)).poison(grey)
    assert forty[0, 0, :5].tolist() == [128, 165, 156, 113, 88]  # 164.96 and 112.69 rounded


def test_8_bit_values_do_not_overflow():
    ends = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)
    black, white = SIG().make_trigger((32, 32)).poison(ends)
    assert black[0, 0, :8].tolist() == [0, 18, 14, 0, 0, 0, 14, 18]
    assert white[0, 0, :8].tolist() == [255, 255, 255, 247, 235, 247, 255, 255]


def test_the_default_is_the_clean_label_attack():
    labels = torch.arange(1000) % 10
    plan = SIG(target=4).plan(labels, 10)
    assert torch.equal(plan.labels_seen, plan.labels_true)
    assert (labels[plan.poison_index] == 4).all()
    assert len(plan.poison_index) == 80


def test_describe_names_what_defines_the_attack():
    described = SIG(variant="convex", alpha=0.3, delta=20, frequency=6).describe()
    assert described["attack"] == "SIG"
    own = {name: described[name] for name in ("delta", "frequency", "variant", "alpha")}
    assert own == {"delta": 20, "frequency": 6, "variant": "convex", "alpha": 0.3}
