"""All tests that apply to a model, one after the other."""

from collections.abc import Collection, Iterator

from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.checking.embeddings import smallest_trigger
from bdclean.checking.flips import count_flips, gather_features
from bdclean.checking.margins import maximum_margins
from bdclean.checking.verdicts import (
    Verdict,
    judge_flips,
    judge_gathering,
    judge_margins,
    judge_trigger,
    not_applicable,
    refuses_flips,
    refuses_images,
    refuses_margins,
)
from bdclean.functional.families import PROBES
from bdclean.progress import Watch, unwatched

TESTS = ("flips", "decree", "mm-bd")
"""What can be chosen; flips are one test for each of `PROBES`."""


def run_tests(
    model: SplitModel,
    images: Tensor | None,
    seed: int = 0,
    tests: Collection[str] = TESTS,
    watch: Watch = unwatched,
) -> Iterator[Verdict]:
    """What each test says, one after the other.

    Args:
        model: Under suspicion, in evaluation mode; left as it is.
        images: (N, 3, H, W), float32 in [0, 1], on its device; None without any.
        seed: Of perturbations and noise.
        tests: Some of `TESTS`, which run in that order.
        watch: Shows how far each is.
    """
    count = None if model.head is None else model.info.num_classes
    given = None if images is None else len(images)
    if "flips" in tests:
        refusal = refuses_flips(count, given)
        if refusal is None and images is not None and count is None:
            yield from map(judge_gathering, gather_features(model, images, seed=seed, watch=watch))
        elif refusal is None and images is not None:
            yield from map(judge_flips, count_flips(model, images, seed=seed, watch=watch))
        else:
            yield from (not_applicable(name, str(refusal)) for name in PROBES)
    if "decree" in tests:
        refusal = refuses_images(given)
        if refusal is None and images is not None:
            yield judge_trigger(smallest_trigger(model, images, seed=seed, watch=watch))
        else:
            yield not_applicable("DECREE", str(refusal))
    if "mm-bd" in tests:
        refusal = refuses_margins(count, model.info.input_size)
        if refusal is None:
            yield judge_margins(maximum_margins(model, seed=seed, watch=watch))
        else:
            yield not_applicable("MM-BD", refusal)
