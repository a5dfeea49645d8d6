"""What tests have said, kept as it comes, so that a command that goes on repeats none of them."""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import bdclean
from bdclean.backbones import SplitModel
from bdclean.checking import TESTS, Verdict, run_tests
from bdclean.files import sha256_of_tensor, write_text
from bdclean.progress import Watch

NAME = ".tests.json"
"""The file, in the run folder; hidden, because `checks.json` has all of it in order."""


def kept_tests(
    file: Path, model: SplitModel, images: Tensor, tests: Collection[str], watch: Watch
) -> Iterator[Verdict]:
    """The same as `run_tests`, of which each test runs once for a model and images.

    Args:
        file: Where verdicts are kept; it need not exist.
        model: Under suspicion, in evaluation mode.
        images: (N, 3, H, W), float32 in [0, 1].
        tests: Some of `TESTS`.
        watch: Shows how far each is.
    """
    of = _fingerprint(model, images)
    for test in (test for test in TESTS if test in tests):
        key = f"{test} {of}"
        kept = _read(file).get(key)
        if kept is not None:
            yield from (Verdict(**each) for each in kept)
            continue
        said = []
        for verdict in run_tests(model, images, tests=(test,), watch=watch):
            said.append(asdict(verdict))
            yield verdict
        write_text(file, json.dumps({**_read(file), key: said}) + "\n")


def _fingerprint(model: SplitModel, images: Tensor) -> str:
    """Changes with all that a verdict depends on."""
    tensors = {"": images, **model.state_dict()}
    parts = [bdclean.__version__, repr(model.info)]
    parts += [f"{name} {sha256_of_tensor(tensor.cpu())}" for name, tensor in tensors.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or one that is cut off
        return {}
    return kept if isinstance(kept, dict) else {}
