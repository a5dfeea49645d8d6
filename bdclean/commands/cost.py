"""What tests and purification will take, from a step of its own work on this machine."""

import math
import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.checking import LARGE, PROBES, TESTS, MarginTest, TriggerSearch
from bdclean.checking.verdicts import refuses_flips, refuses_images, refuses_margins
from bdclean.commands.canary import EPOCHS
from bdclean.errors import counted
from bdclean.functional.precision import fast_format
from bdclean.purification.shortcut import PROBED

_TRIALS = 3
_FORWARD = 1 / 3  # of a pass forward and back through all weights
_TO_INPUTS = 2 / 3  # forward, and back to the images
_FAMILIES = ("ball", "patch", "universal")
_FEW, _FEWER = 32, 8  # images of a trial, and of large images


def cost_line(
    settings: Mapping[str, Any],
    count: int,
    suspect: SplitModel,
    images: Tensor,
    *,
    tests: Collection[str] = TESTS,
    canary: bool = False,
) -> str:
    """A sentence: images, steps, and about how long.

    Args:
        settings: Of the method, merged.
        count: How many images there are.
        suspect: As the fit starts from it.
        images: Some of them, (N, 3, S, S), float32 in [0, 1].
        tests: That run before and after.
        canary: Whether a canary is planted and purified too.
    """
    recipe = settings["recipe"]
    trained = count - round(count * settings.get("held_out", 0))
    steps = recipe["epochs"] * math.ceil(trained / recipe["batch_size"])
    each = seconds_of_a_pass(suspect, images)
    fit = recipe["epochs"] * trained * _passes(settings)
    fit += _passes_of_flips(min(count, PROBED)) if settings.get("choose") else 0
    fit += fit + EPOCHS * count if canary else 0
    both = 2 * _passes_of_tests(suspect, len(images), tests)
    more = ", and as many for the canary" if canary else ""
    return (
        f"{counted(trained, 'image')} to train on, {counted(recipe['epochs'], 'epoch')}, "
        f"{counted(steps, 'step')}{more}: {_roughly(each * fit)}; the tests before and after: "
        f"{_roughly(each * both)} on this machine."
    )


def tests_line(suspect: SplitModel, images: Tensor | None, which: Collection[str]) -> str:
    """A sentence: how long the tests of `bdclean check` take.

    Args:
        suspect: The model that they look at.
        images: As of `cost_line`; None without any.
        which: Tests that run.
    """
    size = suspect.info.input_size
    device = next(suspect.parameters()).device
    some = torch.rand(_FEW, 3, size, size, device=device) if images is None else images
    passes = _passes_of_tests(suspect, 0 if images is None else len(images), which)
    return f"This takes {_roughly(seconds_of_a_pass(suspect, some) * passes)} on this machine."


def _roughly(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return "a minute or two"
    return f"about {minutes} minutes" if minutes < 100 else f"about {minutes / 60:.0f} hours"


def _passes(settings: Mapping[str, Any]) -> float:
    """Of one image in one epoch, in passes forward and back."""
    steps = [settings[name]["steps"] for name in _FAMILIES if settings.get(name)]
    if steps:  # the suspect's answers, the perturbation, and both images in the student
        return _FORWARD + float(_TO_INPUTS * sum(steps) / len(steps)) + 2
    if settings.get("pgd"):  # of two views and a perturbed one
        return 2 * _FORWARD + float(_TO_INPUTS * settings["pgd"]["steps"]) + 3
    return _FORWARD + 1


def _passes_of_tests(model: SplitModel, count: int, tests: Collection[str]) -> float:
    classes = None if model.head is None else model.info.num_classes
    passes = 0.0
    if "flips" in tests and refuses_flips(classes, count) is None:
        passes += _passes_of_flips(count) / _TO_INPUTS
    if "decree" in tests and refuses_images(count) is None:
        passes += count * TriggerSearch().epochs
    if "mm-bd" in tests and refuses_margins(classes, model.info.input_size) is None:
        margins = MarginTest()
        passes += (classes or 0) * margins.starts * margins.steps
    return _TO_INPUTS * passes


def _passes_of_flips(count: int) -> float:
    return _TO_INPUTS * count * sum(getattr(family, "steps", 0) for family in PROBES.values())


def seconds_of_a_pass(model: SplitModel, images: Tensor) -> float:
    """Of one image forward and back through a copy of the model."""
    copy = model.copy().train().requires_grad_(True)
    x = images[: _FEWER if images.shape[-1] > LARGE else _FEW]
    x = x.contiguous(memory_format=torch.channels_last)
    if len(x) == 1:
        x = x.repeat(2, 1, 1, 1)
    taken = []
    for _ in range(_TRIALS):  # the first pass is slow, and others have the machine at times
        begun = time.perf_counter()
        with torch.enable_grad(), fast_format(x.device.type):
            torch.autograd.backward(copy.features(x).float().square().mean())
        if x.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken) / len(x)
