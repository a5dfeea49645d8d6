"""From what was measured to what can be said of it. Never that a model is clean."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bdclean.checking.embeddings import SmallestTrigger
from bdclean.checking.flips import Flips, Gathered
from bdclean.checking.margins import Margins
from bdclean.functional.families import FEWEST_IMAGES, LEAST_CLASSES, PILED
from bdclean.functional.gathering import GATHERED

State = Literal["suspicious", "nothing found", "not applicable"]

_MOST_WORK = 200  # of MM-BD: classes of 32 pixels
_LEAST_P = 0.0001  # that is shown
P = 0.01  # of MM-BD; its paper has 0.05, which names a class in one of four clean networks of ours
ALIKE = 0.9  # mean cosine of features above which DECREE cannot tell anything
SMALL = 0.1  # of DECREE: share of the image below which a trigger is too small, as in its paper


@dataclass(frozen=True)
class Verdict:
    """What one test says.

    Attributes:
        test: Its name.
        state: What it found. `nothing found` is no proof that there is nothing.
        why: The statistic and its bound, or why the test does not apply, in a sentence.
        target: The class that the backdoor seems to lead to, where it is suspicious.
        statistics: The numbers behind it, by name.
    """

    test: str
    state: State
    why: str
    target: int | None = None
    statistics: dict[str, float] | None = None


def classes_named(verdicts: Iterable[Verdict]) -> str:
    """The classes that suspicious verdicts point to, as `class 1 or class 6`; may be empty."""
    targets = sorted({each.target for each in verdicts if each.target is not None})
    return " or ".join(f"class {k}" for k in targets)


def judge_flips(found: Flips) -> Verdict:
    """Whether one family's flips pile up in one class."""
    seen, bound = found.concentration, PILED[found.family]
    why = (
        f"{100 * seen.piled:.0f} % of the images change to class {seen.favourite} (suspicious "
        f"above {100 * bound:.0f} %), and {100 * (seen.flipped - seen.piled):.0f} % to other "
        "classes"
    )
    suspicious = seen.piled > bound
    return Verdict(
        found.family,
        "suspicious" if suspicious else "nothing found",
        why,
        seen.favourite if suspicious else None,
        {"flipped": seen.flipped, "share": seen.share, "piled": seen.piled, "bound": bound},
    )


def judge_gathering(found: Gathered) -> Verdict:
    """Whether one family makes the features gather in one point."""
    share, bound = found.gathering.share, GATHERED[found.family]
    way = f"go {100 * share:.0f} % of the way to one point" if share > 0 else "do not gather"
    why = (
        f"under the perturbation the features of the images {way} (suspicious above "
        f"{100 * bound:.0f} %)"
    )
    suspicious = share > bound
    return Verdict(
        found.family,
        "suspicious" if suspicious else "nothing found",
        why,
        None,
        {"gathered": share, "bound": bound},
    )


def judge_margins(found: Margins) -> Verdict:
    """Whether the largest margin is out of line with the others."""
    suspicious = found.p < P
    why = (
        f"the largest margin is that of class {found.target}, {found.z:.1f} deviations above the "
        f"middle; by the distribution of the others p {p_value(found.p)} (suspicious below {P})"
    )
    return Verdict(
        "MM-BD",
        "suspicious" if suspicious else "nothing found",
        why,
        found.target if suspicious else None,
        {"p": found.p, "z": found.z, "bound": P},
    )


def p_value(p: float) -> str:
    """A p-value with its sign of comparison."""
    return f"= {p:.2g}" if p >= _LEAST_P else f"< {_LEAST_P}"


def judge_trigger(found: SmallestTrigger) -> Verdict:
    """Whether a trigger is too small for all images to look the same without a backdoor."""
    if found.untouched > ALIKE:
        return not_applicable(
            "DECREE",
            "to the backbone the images look the same without any trigger (mean cosine "
            f"{found.untouched:.2f}); are they such as the model was made for?",
        )
    suspicious = found.share < SMALL
    why = (
        f"the smallest trigger found that makes all images look the same to the backbone covers "
        f"{100 * found.share:.1f} % of the image (suspicious below {100 * SMALL:.0f} %)"
    )
    if found.share == 1:
        why = "no trigger was found under which all images look the same to the backbone"
    return Verdict(
        "DECREE",
        "suspicious" if suspicious else "nothing found",
        why,
        None,
        {"share": found.share, "bound": SMALL, "untouched": found.untouched},
    )


def not_applicable(test: str, why: str) -> Verdict:
    """That a test cannot be run, and why."""
    return Verdict(test, "not applicable", why)


def refuses_flips(num_classes: int | None, images: int | None) -> str | None:
    """Why flips, or the gathering of features, cannot be judged; None if they can.

    Args:
        num_classes: K; None without a head.
        images: How many there are; None without a folder.
    """
    if num_classes is not None and num_classes < LEAST_CLASSES:
        return f"with {num_classes} classes, flips pile up in one of them anyway"
    return refuses_images(images)


def refuses_images(images: int | None) -> str | None:
    """Why images are too few; None if they are not.

    Args:
        images: How many there are; None without a folder.
    """
    if images is None:
        return "it needs images: give a FOLDER of photos, without labels"
    if images < FEWEST_IMAGES:
        return f"{images} images are too few; give {FEWEST_IMAGES} or more"
    return None


def refuses_margins(num_classes: int | None, input_size: int) -> str | None:
    """Why MM-BD cannot be run; None if it can.

    Args:
        num_classes: K; None without a head.
        input_size: Side of the images in pixels.
    """
    if num_classes is None:
        return "the model has no classifier head, so that it has no margins"
    if num_classes < LEAST_CLASSES:
        return f"{num_classes} classes are too few to compare one with the others"
    work = num_classes * (input_size / 32) ** 2
    if work > _MOST_WORK:
        return (
            f"{num_classes:,} classes of {input_size} pixels would take some {work / 10:,.0f} "
            "times as long as 10 classes of 32 pixels, which take minutes"
        )
    return None
