"""What attacks do to images: clean, triggered, and the difference.

The fidelity of a trigger is its peak signal-to-noise ratio on pixels in [0, 1],
PSNR = 10 log10(1 / MSE), with the mean squared error over channels and pixels of one image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Preview:
    """What one attack does to a few test images, and how much to all that count.

    Attributes:
        name: Of the attack.
        clean: (n, 3, H, W) uint8, test images as stored.
        triggered: (n, 3, H, W) uint8, the same as the triggered test loader shows them.
        as_trained: (m, 3, H, W) uint8, m <= n training images as they are poisoned, if training
            uses another version of the trigger; else None.
        psnr: (n,) float64, of the test images shown, in dB; infinite for an unchanged image.
        psnr_all: (N,) float64, of all triggered test images.
    """

    name: str
    clean: Tensor
    triggered: Tensor
    as_trained: Tensor | None
    psnr: Tensor
    psnr_all: Tensor

    @property
    def mean_psnr(self) -> float:
        """Mean over the test images that the trigger changes, in dB; infinite without any."""
        changed = self.psnr_all[self.psnr_all.isfinite()]
        return float(changed.mean()) if len(changed) else math.inf

    def summary(self) -> str:
        """One line for the terminal."""
        shown = ", ".join(f"{value:.1f}" for value in self.psnr.tolist())
        line = f"{self.name}: PSNR {shown} dB, mean {self.mean_psnr:.1f} dB over "
        unchanged = int(self.psnr_all.isinf().sum())
        line += f"{len(self.psnr_all) - unchanged:,} test images"
        line += f"; {unchanged:,} more stay as they are" if unchanged else ""
        if self.as_trained is not None:
            line += "; training uses another version of the trigger"
        return line


def psnr(clean: Tensor, triggered: Tensor) -> Tensor:
    """PSNR of each pair of images in dB, (N,) float64; infinite where they are equal.

    Args:
        clean: (N, 3, H, W), uint8.
        triggered: (N, 3, H, W), uint8.
    """
    difference = (triggered.short() - clean.short()).flatten(1).int()
    error = difference.square().sum(1).double() / (difference.shape[1] * 255**2)
    return -10 * error.log10()


def draw(previews: Sequence[Preview], amplify: float = 5.0) -> "Figure":
    """One row per attack and image: clean, triggered, |difference| * amplify, and as trained.

    The last column is there if the training images of any attack differ; it shows other images
    than the test images beside it.
    """
    from matplotlib.figure import Figure

    titles = ["clean", "triggered", f"difference x {amplify:g}"]
    if any(each.as_trained is not None for each in previews):
        titles.append("as trained")
    lines = [(each, k) for each in previews for k in range(len(each.clean))]
    figure = Figure(figsize=(1.2 + 1.5 * len(titles), 0.3 + 1.5 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), len(titles), squeeze=False)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize="medium")
    for line, (each, k) in zip(panels, lines, strict=True):
        difference = (each.triggered[k].short() - each.clean[k].short()).abs() * amplify
        images = [each.clean[k], each.triggered[k], difference.clamp(max=255).byte()]
        if each.as_trained is not None:
            images += each.as_trained[k : k + 1]
        for column, panel in enumerate(line):
            _show(panel, images[column] if column < len(images) else None)
        text = f"PSNR {float(each.psnr[k]):.1f} dB"
        if k == 0:
            text = f"{each.name}\n{text}\nmean {each.mean_psnr:.1f} dB"
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize="small")
    return figure


def _show(panel: "Axes", image: Tensor | None) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    if image is None:
        panel.set_axis_off()
    else:
        panel.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
