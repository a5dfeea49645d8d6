"""What `import bdclean` offers: check a model, and clean it, as the commands of these names do.

    cleaned = bdclean.purify("suspect.pth", "photos").model

A model is a weights file or a network in memory; images are a folder or a tensor.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdclean.backbones.live import split_live, unwrapped
from bdclean.checking import Verdict, run_tests
from bdclean.commands.check import images_of, read_model, some_of, usual_count
from bdclean.commands.front import as_words
from bdclean.commands.model_options import chosen_tests
from bdclean.commands.purify import TAKEN
from bdclean.commands.purify_job import Job, PurifyResult
from bdclean.commands.purifying import IN_MEMORY, purify_model
from bdclean.errors import ConfigError, DataError

__all__ = ["PurifyResult", "Verdict", "check", "purify"]

_AGAIN = "bdclean.purify(...) with the same arguments"
_OURS = ("run", "data.num_classes", "data.mean", "data.std")
Model = str | Path | nn.Module
Images = str | Path | Tensor


def purify(
    model: Model,
    images: Images,
    *,
    method: str = "auto",
    run: str | Path | None = None,
    out: str | Path | None = None,
    labels: str | Path | None = None,
    trigger: str | Path | None = None,
    target: int | None = None,
    count: int | None = None,
    tests: Sequence[str] | None = None,
    canary: bool = False,
    arch: str | None = None,
    width: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PurifyResult:
    """Removes a backdoor with unlabelled images, as `bdclean purify` does.

    Args:
        model: A weights file, or a network; either stays as it is. A network maps normalised
            images (B, 3, H, W) to logits (B, K), which a linear layer gives: its head.
        images: A folder, or (N, 3, H, W), uint8 or float in [0, 1], not normalised.
        method: `auto` (`shortcut` today), `shortcut`, `bcu` or `cbd`. `cbd` gives a backbone
            without a head, so it takes no network in memory.
        run: The run folder; None leaves no file. One that exists is gone on with, if it is of the
            same purification of a file.
        out: Cleaned weights by the names of the file or network; None puts them into the run.
        labels: A folder of labelled images, one folder a class, that only measure.
        trigger: A `trigger.safetensors` that only measures; it needs `labels`.
        target: Its class; None takes that of the `plan.json` beside it.
        count: How many images the tests use, at most; None takes 500 up to 64 pixels, else 128.
        tests: Some of `flips`, `decree`, `mm-bd`; None runs all.
        canary: Also purify a copy with triggers of ours, whose success is measured; as long again.
        arch: Of a foreign file; None guesses it.
        width: Channels of its first layer.
        num_classes: Checked.
        input_size: Side of the images; None takes that of the file, or of the network's
            `pretrained_cfg` (timm), or 224 for networks of torchvision.
        mean: What images are normalised with; None as for `input_size`.
        std: As `mean`.
        settings: Options of `bdclean fit`, such as `{"model.recipe.epochs": 20}`.

    Returns:
        The cleaned model and what was measured. Of a network, a network of the same class.

    Raises:
        ConfigError: If an argument is wrong, or the fit was stopped.
        WeightsError: If the file cannot be read safely, or does not fit the architecture.
        DataError: If there are no images.
    """
    facts: dict[str, Any] = {"num_classes": num_classes, "input_size": input_size}
    facts |= {"mean": mean, "std": std}
    known: dict[str, Any] = {"method": method, "arch": arch, "width": width}
    known |= {"out": None if out is None else str(out), "target": target}
    known |= {"canary": canary}
    known |= {"labels": None if labels is None else str(labels)}
    known |= {"trigger": None if trigger is None else str(trigger)}
    number, which = _positive("count", count), chosen_tests("tests", tests)
    with _own_state():
        job = _job(model, images, facts, settings or {}, **known)
        job = replace(job, images=number, tests=which)
    in_memory = job.network is not None or job.pixels is not None
    if run is not None and Path(run).exists() and in_memory:
        raise ConfigError(
            f"run={str(run)!r}: it exists already, and a run of what is in memory does not go on; "
            "name a new folder."
        )
    with _folder(run) as folder, _own_state():
        result = purify_model(replace(job, run=str(folder)), say=lambda _: None)
    if result is None:
        raise ConfigError("The fit was stopped before its end; leave out what limits it.")
    kept = result.out if run is not None or out is not None else None
    return result if run is not None else replace(result, run=None, weights=None, out=kept)


def _job(
    model: Model,
    images: Images,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    **known: Any,
) -> Job:
    model = _checked(model)
    network = model if isinstance(model, nn.Module) else None
    if network is not None and known["method"] == "cbd":
        raise ConfigError("method='cbd' leaves a backbone without a head; save the network first.")
    return Job(
        model=str(model) if network is None else type(network).__qualname__,
        folder=IN_MEMORY if isinstance(images, Tensor) else _path("images", images),
        input_size=facts["input_size"] if network is None else None,
        words=tuple(_words(settings)),
        again=_AGAIN,
        known={key: facts[key] for key in ("num_classes", "mean", "std")},
        network=network,
        suspect=None if network is None else split_live(network, **facts),
        pixels=_pixels(images) if isinstance(images, Tensor) else None,
        **known,
    )


def check(
    model: Model,
    images: Images | None = None,
    *,
    arch: str | None = None,
    width: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    count: int | None = None,
    tests: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """Tests a model for backdoors without labels, as `bdclean check` does.

    Args:
        model: As of `purify`.
        images: As of `purify`; None runs the tests that need no images.
        arch: As of `purify`.
        width: As of `purify`.
        num_classes: As of `purify`.
        input_size: As of `purify`.
        mean: As of `purify`.
        std: As of `purify`.
        count: How many images to use, at most; None takes 500 up to 64 pixels, else 128.
        tests: As of `purify`.
        seed: Of choice and perturbations.

    Returns:
        One verdict a test. None of them says that the model is clean.

    Raises:
        ConfigError: If an argument is wrong.
        WeightsError: If the file cannot be read safely, or does not fit the architecture.
        DataError: If there are no images.
    """
    facts: dict[str, Any] = {
        "num_classes": num_classes,
        "input_size": input_size,
        "mean": mean,
        "std": std,
    }
    which = chosen_tests("tests", tests)
    number = _positive("count", count)
    model = _checked(model)
    with _own_state():
        if isinstance(model, nn.Module):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            suspect = split_live(model, **facts).to(device)
        else:
            suspect = read_model(str(model), arch=arch, width=width, **facts)
        suspect.eval()
        size, seen = suspect.info.input_size, None
        number = number or usual_count(size)
        if isinstance(images, Tensor):
            seen = some_of(_pixels(images), size, number, seed)
        elif images is not None:
            seen = images_of(_path("images", images), size, number, seed)
        return list(run_tests(suspect, seen, seed, which))


def _positive(key: str, number: int | None) -> int | None:
    if number is not None and number < 1:
        raise ConfigError(f"{key}={number}: it must be at least 1.")
    return number


def _checked(model: Model) -> Model:
    if isinstance(model, nn.Module):
        return unwrapped(model)
    return _path("model", model)


def _path(key: str, value: object) -> str:
    if isinstance(value, str | Path):
        return str(value)
    given = f"of the type {type(value).__name__}"
    if key == "model":
        raise ConfigError(f"model is {given}; it must be a weights file or a torch.nn.Module.")
    raise DataError(f"{key} are {given}; they must be a folder or a tensor (N, 3, H, W).")


def _words(settings: Mapping[str, Any]) -> list[str]:
    for key in settings:
        if key in _OURS or f"--{key}" in TAKEN:
            raise ConfigError(f"settings: {key} is set by the arguments of bdclean.purify.")
    words = {"trainer.devices": "1"}
    for key, value in settings.items():
        words[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return as_words(words)


def _pixels(images: Tensor) -> Tensor:
    """Images as they are stored, (N, 3, H, W), uint8.

    Raises:
        DataError: If they are none.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(f"images have shape {tuple(images.shape)}; they must be (N, 3, H, W).")
    if images.is_meta or not (images.dtype == torch.uint8 or images.is_floating_point()):
        kind = "without values" if images.is_meta else f"{images.dtype}"
        raise DataError(
            f"images are {kind}; they must be uint8, or floats in [0, 1] that are not normalised."
        )
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"images are {images.dtype} from {low:.3g} to {high:.3g}; they must be uint8, or "
            "floats in [0, 1] that are not normalised."
        )
    return (images.float() * 255).round().to(torch.uint8)


@contextmanager
def _folder(run: str | Path | None) -> Iterator[Path]:
    if run is not None:
        yield Path(run)
        return
    with TemporaryDirectory(prefix="bdclean-") as name:
        yield Path(name) / "run"


@contextmanager
def _own_state() -> Iterator[None]:
    """Settings of torch as they usually are; those of the caller stay, and random numbers too."""
    numbers, arrays, kind = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            yield
    finally:
        torch.set_default_dtype(kind)
        random.setstate(numbers)
        np.random.set_state(arrays)
