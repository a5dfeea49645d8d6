"""What a defence found in a training set: a sheet of samples, histograms, and courses."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PER_LINE = 10  # pictures
_TITLE = 0.22  # room above a picture, of its side
_BINS = 60
_COLORS = {
    "clean": "C0",
    "not flagged": "C0",
    "all": "C0",
    "cover": "C1",
    "poisoned": "C3",
    "flagged": "C3",
}


def draw_sheet(images: Tensor, captions: Sequence[str], tiers: Tensor, heading: str) -> "Figure":
    """Pictures in lines of ten, each under its caption.

    Captions of flagged ones are red, and bold of those that are likely to be poisoned.

    Args:
        images: (M, 3, H, W), uint8, square.
        captions: M, short.
        tiers: (M,): 0 is not flagged, 1 flagged, 2 likely.
        heading: Above the sheet.
    """
    from matplotlib.figure import Figure

    lines = -(-len(images) // _PER_LINE)
    height = lines * (1 + _TITLE)
    bold = ", bold if likely" if (tiers > 1).any() else ""
    figure = Figure(figsize=(_PER_LINE, height + 0.4))
    figure.text(
        0.5,
        1 - 0.2 / (height + 0.4),
        f"{heading} (label → proposed label, red if flagged{bold})",
        ha="center",
        va="center",
    )
    # One panel for all: a hundred panels take seconds to lay out.
    panel = figure.add_axes((0, 0, 1, height / (height + 0.4)))
    pixels = images.permute(0, 2, 3, 1).numpy()
    for k, (caption, tier) in enumerate(zip(captions, tiers.tolist(), strict=True)):
        x, y = k % _PER_LINE, (k // _PER_LINE) * (1 + _TITLE) + _TITLE
        panel.imshow(pixels[k], extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04))
        color, weight = "crimson" if tier else "black", "bold" if tier > 1 else "normal"
        text = panel.text(x + 0.5, y, caption, ha="center", va="bottom", fontsize="small")
        text.set(color=color, fontweight=weight)
    panel.set_xlim(0, _PER_LINE)
    panel.set_ylim(height, 0)
    panel.set_axis_off()
    return figure


def draw_scores(scores: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> "Figure":
    """One histogram per score, on a logarithmic scale, split into groups of samples.

    Values that are infinite or NaN are left out; the title counts them.

    Args:
        scores: (N,) each, by name.
        groups: Masks (N,), bool, by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 + 2.6 * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), squeeze=False)[:, 0]
    for panel, (name, score) in zip(panels, scores.items(), strict=True):
        finite = score.isfinite()
        edges = np.histogram_bin_edges(score[finite].double().numpy(), _BINS)
        for group, mask in groups.items():
            values = score[mask & finite].double().numpy()
            label = f"{group} ({int(mask.sum()):,})"
            panel.hist(values, edges, alpha=0.6, color=_COLORS[group], label=label)
        left_out = int((~finite).sum())
        panel.set_title(f"{name} ({left_out:,} not finite)" if left_out else name)
        panel.set_yscale("log")
        panel.set_ylim(bottom=0.5)  # else a bar of one sample has no height
        panel.set_ylabel("samples")
        panel.legend(fontsize="small")
    return figure


def draw_courses(courses: Mapping[str, Mapping[str, Mapping[int, float]]]) -> "Figure":
    """One panel per unit of time, with a line per percentage.

    Args:
        courses: Unit, then name of the line, then percent by the number of the round or epoch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 + 2.8 * len(courses)), layout="constrained")
    panels = figure.subplots(len(courses), squeeze=False)[:, 0]
    for panel, (unit, lines) in zip(panels, courses.items(), strict=True):
        for name, course in lines.items():
            times = sorted(course)
            panel.plot(times, [course[t] for t in times], marker=".", label=name)
        panel.set_xlabel(unit)
        panel.set_ylabel("percent")
        panel.set_ylim(-3, 103)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize="small")
    return figure
