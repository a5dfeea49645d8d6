"""How far features gather in one point."""

import pytest
import torch

from bdclean.functional.families import PROBES
from bdclean.functional.gathering import GATHERED, gathering


def test_bounds_are_those_of_the_probes():
    assert GATHERED.keys() == PROBES.keys()


def test_features_that_gather():
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(400, 64, generator=draw)
    point = torch.randn(64, generator=draw)
    assert gathering(before, before).share == pytest.approx(0, abs=0.05)
    assert gathering(before, point.expand(400, 64)).share == pytest.approx(1)
    apart = torch.randn(400, 64, generator=draw)
    assert gathering(before, apart).share == pytest.approx(0, abs=0.05)
    half = torch.where(torch.arange(400)[:, None] % 2 == 0, point, before)
    found = gathering(before, half)  # of those that move all are there
    assert found.share == pytest.approx(1)
    torch.testing.assert_close(found.point, point / point.norm(), atol=1e-5, rtol=0)


def test_the_share_is_of_the_way_that_is_left():
    away = torch.eye(9)[:8]  # mean cosine 0
    assert gathering(away, away + torch.eye(9)[8]).share == pytest.approx(0.5)
    near = away + torch.eye(9)[8]  # mean cosine 0.5
    assert gathering(near, away + 3 * torch.eye(9)[8]).share == pytest.approx((0.9 - 0.5) / 0.5)
    assert gathering(near, away).share == pytest.approx(-1)
    assert gathering(away[:1].expand(9, 9), away[:1].expand(9, 9)).share == 0


def test_two_points_agree_by_their_cosine():
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(40, 8, generator=draw)
    one, near, far = (torch.tensor([1.0, y, *[0.0] * 6]) for y in (0.0, 0.5, 1.0))
    found = [gathering(before, each.expand(40, 8)) for each in (one, near, far)]
    assert found[0].agrees(found[1])
    assert not found[0].agrees(found[2])
