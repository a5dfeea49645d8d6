import pytest
import torch
from torch import nn

from bdclean.errors import ConfigError
from bdclean.functional.consistency import (
    PatchScore,
    adversarial_patch,
    grid_centres,
    patch_mask,
    prediction_change,
)
from bdclean.functional.pgd import PGD

CENTRES = torch.tensor([[0, 0], [4, 3], [7, 2]])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", ["square", "disc"])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_masks_against_the_definition(shape, radius):
    mask = patch_mask(CENTRES, radius, 8, shape)
    assert mask.shape == (3, 1, 8, 8)
    for image, (c1, c2) in enumerate(CENTRES.tolist()):
        for row in range(8):
            for column in range(8):
                if shape == "square":
                    inside = abs(row - c1) <= radius and abs(column - c2) <= radius
                else:
                    inside = (row - c1) ** 2 + (column - c2) ** 2 <= radius**2
                assert mask[image, 0, row, column] == inside


def test_a_patch_of_radius_four_has_81_pixels():
    assert patch_mask(torch.tensor([[16, 16]]), 4, 32).sum() == 81


def test_prediction_change_is_the_divergence_from_before():
    before = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    after = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    p, q = before.softmax(1), after.softmax(1)
    wanted = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(prediction_change(before, after), wanted)
    assert prediction_change(before, after)[1] == 0
    assert prediction_change(before, after)[0] != prediction_change(after, before)[0]


@pytest.mark.parametrize(("count", "line"), [(1, [16]), (4, [8, 24]), (9, [5, 16, 26])])
def test_a_grid_shares_the_image_out(count, line):
    wanted = [[row, column] for row in line for column in line]
    assert grid_centres(count, 32).tolist() == wanted


def test_a_grid_has_as_many_rows_as_columns():
    with pytest.raises(ConfigError, match=r"num_masks=3: patch\.places=grid needs a square number"):
        PatchScore(places="grid")


@pytest.mark.parametrize("inner", ["kl", "ce"])
def test_only_the_patch_moves_and_only_within_the_ball(net, images, inner):
    mask = patch_mask(CENTRES, 1, 8)
    config = PGD(8, 5, 0.5)
    moved = adversarial_patch(
        images, net(images).detach(), mask, net, config, inner, torch.Generator().manual_seed(0)
    )
    change = moved - images
    assert not change[~mask.expand_as(change)].any()
    assert change[mask.expand_as(change)].any()
    assert change.abs().max() <= 8 / 255 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_the_patch_is_the_worst_one_for_a_linear_network(net, images):
    """For K = 2 the divergence grows with the distance of the logits, whose maximum is known."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    mask = patch_mask(CENTRES, 1, 8)
    inner = images * 0.5 + 0.25  # away from 0 and 1
    weight = (linear[1].weight[0] - linear[1].weight[1]).view(3, 8, 8)
    reach = (8 / 255) * (weight.abs() * mask).flatten(1).sum(1)
    moved = adversarial_patch(inner, linear(inner).detach(), mask, linear, PGD(8, 8, 0.5))
    logits = linear(moved) - linear(inner)
    torch.testing.assert_close((logits[:, 0] - logits[:, 1]).abs(), reach)


def test_without_a_random_start_the_divergence_has_no_gradient(net, images):
    """The reason why `kl` is not to be used without one."""

    def steepest(at):
        at = at.requires_grad_()
        change = prediction_change(net(images).detach(), net(at)).sum()
        return torch.autograd.grad(change, at)[0].abs().max()

    assert steepest(images.clone()) < 1e-6
    assert steepest(images + 8 / 255 * torch.rand_like(images)) > 1e-4


def test_more_steps_change_the_prediction_more(net, images):
    mask = patch_mask(CENTRES, 3, 8)

    def reached(steps):
        draw = torch.Generator().manual_seed(3)
        moved = adversarial_patch(
            images, net(images).detach(), mask, net, PGD(8, steps, 0.25), "kl", draw
        )
        return prediction_change(net(images), net(moved))

    assert (reached(8) > reached(1)).all()


def test_the_least_effect_of_all_patches_counts(net, images):
    """One patch of many that moves the prediction says nothing: it may have hit the trigger."""
    many = images.repeat(40, 1, 1, 1)

    def score(num_masks, seed=0):
        draw = torch.Generator().manual_seed(seed)
        pgd = PGD(8, 2, 0.75, random_start=True)
        return PatchScore("square", 1, pgd, "kl", num_masks)(many, net, net, draw)

    with torch.no_grad():
        first, least = score(1), score(4)
    assert (least <= first).all()  # the first patch is the same
    assert (least < first).float().mean() > 0.5
    assert (least > 0).all()


def test_the_least_effect_on_a_grid_by_hand(net, images):
    """All images have the same patches."""
    pgd = PGD(8, 4, 0.5, random_start=False)
    score = PatchScore("square", 1, pgd, "ce", 9, "grid")
    before = net(images).detach()
    changes = []
    for centre in grid_centres(9, 8):
        mask = patch_mask(centre.expand(3, 2), 1, 8)
        moved = adversarial_patch(images, before, mask, net, pgd, "ce")
        changes.append(prediction_change(before, net(moved).detach()))
    wanted = torch.stack(changes).amin(0)
    torch.testing.assert_close(score(images, net, net, torch.Generator()).detach(), wanted)


def test_a_patch_on_the_trigger_moves_only_the_score_of_that_patch():
    """A network that reads one pixel: a poisoned image is stable unless the patch is there."""

    def reads_a_corner(x):
        return torch.stack([200 * (x[:, 0, 0, 0] - 0.02), torch.zeros(len(x))], 1)

    images = torch.full((400, 3, 8, 8), 0.03)

    def moved(num_masks):
        draw = torch.Generator().manual_seed(5)
        pgd = PGD(8, 2, 0.75, random_start=True)
        score = PatchScore("square", 1, pgd, "kl", num_masks)
        return (score(images, reads_a_corner, reads_a_corner, draw) > 1).float().mean()

    hit = 4 / 64  # centres from which a patch of radius 1 covers the corner
    assert moved(1) == pytest.approx(hit, abs=0.04)
    assert moved(3) == 0
