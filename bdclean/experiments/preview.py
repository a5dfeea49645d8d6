"""A picture of attacks: a test image, the same with the trigger, and the difference.

The fidelity of a trigger is its peak signal-to-noise ratio on pixels in [0, 1],
PSNR = 10 log10(1 / MSE), with the mean squared error over channels and pixels of one image.
"""

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bdclean.data import ImageDataModule, RoleImages
from bdclean.errors import ConfigError
from bdclean.functional.seeds import derive_seed

_CHUNK = 100  # images whose errors are summed at a time


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


def preview(name: str, data: ImageDataModule, images: int = 1, seed: int = 0) -> Preview:
    """Triggers test images.

    The images shown are the first in a random order of the test set that count for the attack's
    success rate; so attacks with the same target show the same images.

    Args:
        name: Of the attack.
        data: The data set with its attack.
        images: How many to show.
        seed: Of the choice.

    Raises:
        ConfigError: There is no attack, or fewer images than asked for.
    """
    if data.attack is None:
        raise ConfigError(f"{name}: data.init_args.attack is null; give attacks with --attacks.")
    data.prepare_data()
    _ = data.plan  # tells of settings that do not fit the data
    triggered = cast(RoleImages, data.test_dataloader()[1].dataset)
    if len(triggered) < images:
        raise ConfigError(
            f"--images is {images}, but only {len(triggered)} test images count for the success "
            f"rate of {name}; ask for no more."
        )
    generator = torch.Generator().manual_seed(derive_seed("preview", seed))
    order = torch.randperm(len(data.test_set), generator=generator)
    chosen = order[torch.isin(order, triggered.rows)][:images]
    clean, stamped = _pairs(triggered, torch.searchsorted(triggered.rows, chosen).tolist())
    count = len(triggered)
    chunks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    return Preview(
        name=name,
        clean=clean,
        triggered=stamped,
        as_trained=_as_trained(data, images, generator),
        psnr=psnr(clean, stamped),
        psnr_all=torch.cat([psnr(*_pairs(triggered, rows)) for rows in chunks]),
    )


def _pairs(images: RoleImages, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images under the overlay, and as they are handed out."""
    return images.clean(rows), images.shown(rows)


def _as_trained(data: ImageDataModule, images: int, generator: torch.Generator) -> Tensor | None:
    """Poisoned training images that differ from what the test trigger makes of them."""
    plan, trigger = data.plan, data.trigger
    if plan is None or trigger is None or (data.attack is not None and data.attack.dynamic):
        return None
    clean, stored = _pairs(data.role_images("train", labels=True), plan.poison_index.tolist())
    other = stored[(stored != trigger.poison(clean)).flatten(1).any(1)]
    drawn = torch.randperm(len(other), generator=generator)[:images]
    return other[drawn] if len(other) else None


def draw(previews: Sequence[Preview], amplify: float = 5.0) -> Figure:
    """One row per attack and image: clean, triggered, |difference| * amplify, and as trained.

    The last column is there if the training images of any attack differ; it shows other images
    than the test images beside it.
    """
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


def _show(panel: Axes, image: Tensor | None) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    if image is None:
        panel.set_axis_off()
    else:
        panel.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")


def write_preview(
    modules: Iterable[tuple[str, ImageDataModule]],
    out: str | Path,
    *,
    images: int = 1,
    amplify: float = 5.0,
    seed: int = 0,
) -> None:
    """Writes the picture, and prints one line per attack.

    Args:
        modules: Name of an attack and the data set with it; taken one at a time.
        out: The PNG file; one that exists is replaced.
        images: Test images per attack.
        amplify: Factor of the difference.
        seed: Of the choice of images.

    Raises:
        ConfigError: An attack is missing, or the file is no PNG or cannot be written.
    """
    out = png_path(out)
    previews = []
    for name, data in modules:
        previews.append(preview(name, data, images, seed))
        print(previews[-1].summary(), flush=True)
    save_png(draw(previews, amplify), out)
    print(f"Written to {out}")


def png_path(out: str | Path) -> Path:
    """The path of a picture, checked before work on it begins.

    Raises:
        ConfigError: If it is not named as a PNG.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out={out}: the picture is a PNG; end the name in .png.")
    return out


def save_png(figure: Figure, out: Path) -> None:
    """Writes the picture as a whole or not at all; one that exists is replaced.

    Raises:
        ConfigError: If it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"--out={out}: the file cannot be written ({error}).") from error
