"""What a purification is said to take."""

import pytest
import torch

from bdclean.backbones import ModelInfo, build
from bdclean.checking import PROBES, MarginTest, TriggerSearch
from bdclean.commands import cost

RECIPE = {"epochs": 3, "batch_size": 100}


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"patch": {"steps": 3}, "universal": {"steps": 6}, "ball": None}, 1 / 3 + 3 + 2),
        ({"pgd": {"steps": 3}}, 2 / 3 + 2 + 3),
        ({}, 4 / 3),
    ],
)
def test_passes_are_counted(monkeypatch, settings, passes):
    monkeypatch.setattr(cost, "seconds_of_a_pass", lambda *_: 0.5)
    model = build(ModelInfo("resnet18", 6, 8, (0.5,) * 3, (0.25,) * 3, width=4))
    asked = {"recipe": RECIPE, "held_out": 0.1, **settings}
    told = cost.cost_line(asked, 1000, model, torch.zeros(200, 3, 8, 8))
    assert told.startswith("900 images to train on, 3 epochs, 27 steps: ")
    flips = 200 * sum(family.steps for family in PROBES.values())
    margins = 6 * MarginTest().starts * MarginTest().steps
    tests = (flips + margins + 200 * TriggerSearch().epochs) * 2 / 3
    minutes = 0.5 * 2700 * passes / 60
    assert f"steps: {_told(minutes)}; the tests before and after: " in told
    assert told.endswith(f"about {0.5 * 2 * tests / 3600:.0f} hours on this machine.")
    more = cost.cost_line(asked, 1000, model, torch.zeros(200, 3, 8, 8), canary=True)
    minutes += 0.5 * (2700 * passes + 5000) / 60
    assert f"27 steps, and as many for the canary: {_told(minutes)}; the tests" in more


def _told(minutes):
    return f"about {minutes:.0f} minutes" if minutes < 100 else f"about {minutes / 60:.0f} hours"


def test_little_is_told_in_minutes(monkeypatch):
    monkeypatch.setattr(cost, "seconds_of_a_pass", lambda *_: 1e-9)
    headless = build(ModelInfo("resnet18", None, 8, (0.5,) * 3, (0.25,) * 3, width=4))
    told = cost.cost_line({"recipe": RECIPE}, 1, headless, torch.zeros(1, 3, 8, 8))
    assert told.startswith("1 image to train on, 3 epochs, 3 steps: a minute or two; the tests")
    assert told.endswith("a minute or two on this machine.")
    state = {key: value.clone() for key, value in headless.state_dict().items()}
    monkeypatch.undo()
    assert 0 < cost.seconds_of_a_pass(headless, torch.rand(1, 3, 8, 8)) < 60
    assert all(torch.equal(value, state[key]) for key, value in headless.state_dict().items())
