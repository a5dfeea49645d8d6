import copy
import itertools

import pytest
import torch
from torch import nn

from bdclean.errors import ConfigError
from bdclean.functional import PGD, nt_xent, pgd

SETTINGS = [
    PGD(8, 20),
    PGD(16, 5, random_start=False),
    PGD(8, 7, 0.1, "pixel255"),
    PGD(8, 4, 0.1, "unit"),
    PGD(1024, 10, norm="l2"),
    PGD(128, 5, norm="l2", random_start=False),
    PGD(128, 3, 0.1, "unit", "l2"),
]


def images(n=4, size=8, seed=0):
    """Images with many pixels on the border of the box."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, size, size, generator=generator) * 1.6 - 0.3).clamp(0, 1)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()


def contrast(net, x):
    reference = net(x.flip(3)).detach()
    return lambda adversarial: nt_xent(net(adversarial), reference)


def run(config, x=None, seed=1):
    x = images() if x is None else x
    return pgd(x, contrast(network(), x), config, torch.Generator().manual_seed(seed))


def lengths(delta, norm):
    order = float("inf") if norm == "linf" else 2
    return torch.linalg.vector_norm(delta.double(), order, dim=(1, 2, 3))


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_stays_in_ball_and_box_and_raises_the_loss(config):
    x = images()
    loss = contrast(network(), x)
    found = run(config)
    tolerance = 1e-7 if config.norm == "linf" else 1e-6 * config.radius
    assert lengths(found.double() - x.double(), config.norm).max() <= config.radius + tolerance
    assert found.min() >= 0
    assert found.max() <= 1
    assert loss(found) > loss(x) + 1e-4


@pytest.mark.parametrize("config", SETTINGS[:1] + SETTINGS[4:5], ids=str)
def test_images_parameters_and_statistics_are_left_alone(config):
    x, net = images(), network()
    before, x_before = copy.deepcopy(net.state_dict()), x.clone()
    found = pgd(x, contrast(net, x), config)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert found.grad_fn is None
    assert not found.requires_grad
    assert found.data_ptr() != x.data_ptr()


def test_works_under_no_grad_with_frozen_parameters():
    net, x = network().requires_grad_(False), images()
    with torch.no_grad():
        found = pgd(x, contrast(net, x), SETTINGS[1])
    torch.testing.assert_close(found, run(SETTINGS[1]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_epsilon_zero_returns_the_images(norm):
    x = images()
    found = run(PGD(0, 3, 0.1, "unit", norm), x)
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()


def literal(x, loss, config):
    """The updates of L-infinity and L2 ascent from the image itself, image by image."""
    delta = torch.zeros_like(x)
    for _ in range(config.steps):
        delta = delta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x + delta), delta)
        updated = []
        for v, d, g in zip(x, delta.detach(), gradient, strict=True):
            if config.norm == "linf":
                d = (d + config.step * g.sign()).clamp(-config.radius, config.radius)
            else:
                d = d + config.step * g / g.norm()
                d = d * min(1.0, config.radius / d.norm().item())
            updated.append((v + d).clamp(0, 1) - v)
        delta = torch.stack(updated)
    return x + delta


@pytest.mark.parametrize("unit", ["relative", "pixel255", "unit"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8), ("l2", 96)])
def test_equals_the_literal_updates(norm, epsilon, unit):
    # An L2 step of 0.1/255 is far too short to see, so that unit takes longer ones.
    size = 20.0 if (norm, unit) == ("l2", "pixel255") else 0.4
    config = PGD(epsilon, 4, size, unit, norm, random_start=False)
    x = images()
    expected = literal(x, contrast(network(), x), config)
    torch.testing.assert_close(run(config, x), expected, atol=2e-6, rtol=0)


def test_units_of_radius_and_step():
    assert PGD(8, 1).radius == pytest.approx(8 / 255)
    assert PGD(8, 1).step == pytest.approx(0.8 / 255)
    assert PGD(8, 1, step_unit="pixel255").step == pytest.approx(0.1 / 255)
    assert PGD(8, 1, step_unit="unit").step == pytest.approx(0.1)
    assert PGD(1024, 1, norm="l2").radius == pytest.approx(4.0157, abs=1e-4)


@pytest.mark.parametrize("epsilon", [2, 8, 16])
def test_twenty_steps_in_pixel_values_reach_two_values(epsilon):
    x = images() * 0.5 + 0.25  # away from the border of the box
    config = PGD(epsilon, 20, step_unit="pixel255", random_start=False)
    found = pgd(x, lambda adversarial: adversarial.sum(), config)
    assert (found - x).max().item() == pytest.approx(2 / 255, abs=1e-6)
    assert run(config, x).sub(x).abs().max() <= 2 / 255 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_moves_nothing(norm):
    x = images()
    config = PGD(8, 3, norm=norm, random_start=False)
    found = pgd(x, lambda adversarial: (adversarial * 0).sum(), config)
    assert torch.equal(found, x)


def test_l2_steps_do_not_depend_on_the_scale_of_the_loss():
    x = images()
    config = PGD(128, 3, norm="l2", random_start=False)
    loss = contrast(network(), x)
    small = pgd(x, lambda adversarial: loss(adversarial) * 1e-24, config)
    torch.testing.assert_close(small, pgd(x, loss, config), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8), ("l2", 128)])
def test_random_start_is_uniform_in_the_ball_and_comes_from_the_generator(norm, epsilon):
    x = torch.full((400, 1, 1, 2), 0.5)
    config = PGD(epsilon, 1, norm=norm)

    def start(seed):
        generator = torch.Generator().manual_seed(seed)
        return pgd(x, lambda adversarial: (adversarial * 0).sum(), config, generator)

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    radii = lengths(start(1) - x, norm) / config.radius
    # In two dimensions the share of the ball within a fraction q of the radius is q^2.
    for q in (0.3, 0.5, 0.8):
        assert (radii < q).double().mean().item() == pytest.approx(q**2, abs=0.08)
    assert (start(1) - x).mean(0).abs().max() < 0.15 * config.radius


def test_each_step_is_one_call_and_there_is_none_after_the_last():
    calls = itertools.count()

    def loss(adversarial):
        next(calls)
        return adversarial.square().sum()

    pgd(images(), loss, PGD(8, 6))
    assert next(calls) == 6


def test_memory_format_is_kept():
    x = images().to(memory_format=torch.channels_last)
    for config in SETTINGS:
        assert run(config, x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"steps": 0}, "steps"),
        ({"step_size": 0}, "step_size"),
        ({"step_unit": "pixel"}, "step_unit"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_settings_out_of_range_are_named(arguments, key):
    with pytest.raises(ConfigError, match=f"^{key}="):
        PGD(**({"epsilon": 8, "steps": 1} | arguments))
