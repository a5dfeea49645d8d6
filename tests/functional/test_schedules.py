"""Schedules change the rate and nothing else."""

import pytest
import torch
from torch.optim import SGD, Adam

from bdclean.functional.schedules import make_schedule


def course(name, optimizer, key, steps=20):
    schedule = make_schedule(optimizer, name, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0][key])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("name", ["constant", "cosine", "multistep", "onecycle"])
def test_the_momentum_stays_as_it_is_set(name):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert set(course(name, SGD(parameters, 0.1, momentum=0.9), "momentum")) == {0.9}
    assert set(course(name, Adam(parameters, 0.1, betas=(0.8, 0.99)), "betas")) == {(0.8, 0.99)}


def test_onecycle_rises_to_the_rate_and_falls():
    rates = course("onecycle", SGD([torch.nn.Parameter(torch.zeros(1))], 0.1), "lr")
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 1e-4
