"""Pictures of the demo: the trigger on images, and features in the plane by t-SNE."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor

from bdclean.data import Digits
from bdclean.experiments.stages import make_trainer
from bdclean.modules import BackdoorModule

NUM_SAMPLES = 6
MOST_NAMED = 10  # classes in a legend


@dataclass(frozen=True)
class FeatureMap:
    """The test images as points of the plane.

    Attributes:
        title: Of the model.
        clean: (N, 2), the clean test images.
        labels: (N,), their classes.
        triggered: (M, 2), the triggered ones.
        adversarial: (L, 2), adversarial ones; None where there are none.
        target: The class of the attack, which is highlighted; None where there are several.
    """

    title: str
    clean: NDArray[np.float32]
    labels: NDArray[np.int64]
    triggered: NDArray[np.float32]
    adversarial: NDArray[np.float32] | None = None
    target: int | None = None


def feature_map(
    title: str, module: BackdoorModule, data: Digits, seed: int, iterations: int
) -> FeatureMap:
    """Computes the features of all clean and triggered test images, and one t-SNE of both.

    Args:
        title: Of the model.
        module: Holds the model.
        data: Its attack makes the triggered images.
        seed: Of the t-SNE.
        iterations: Of the t-SNE.
    """
    clean, triggered = to_plane(_features(module, data), seed, iterations)
    labels = data.test_set.labels
    if labels is None:
        raise ValueError("The digits have labels.")
    return FeatureMap(title, clean, labels.numpy(), triggered)


def to_plane(
    groups: Sequence[Tensor], seed: int, iterations: int, perplexity: float = 30.0
) -> list[NDArray[np.float32]]:
    """One t-SNE of all groups together.

    Args:
        groups: Features, each (N_g, D).
        seed: Of the t-SNE.
        iterations: Of the t-SNE.
        perplexity: Of the t-SNE; below the number of points.

    Returns:
        Each group in the plane, (N_g, 2).
    """
    # Cosine, as in the contrastive losses and in the probe, which both normalise features.
    points = torch.nn.functional.normalize(torch.cat(list(groups)), dim=1)
    tsne = TSNE(init="pca", random_state=seed, max_iter=iterations, perplexity=perplexity)
    plane = tsne.fit_transform(points.numpy())
    return list(np.split(plane, np.cumsum([len(group) for group in groups])[:-1]))


def _features(module: BackdoorModule, data: Digits) -> list[Tensor]:
    """(N, D) of the clean and (M, D) of the triggered test images, in stored order."""
    loaders = make_trainer().predict(module, datamodule=data) or []
    return [torch.cat([batch["features"] for batch in batches]) for batches in loaders]


def plot_features(maps: Sequence[FeatureMap]) -> Figure:
    """One panel per model: clean images coloured by class, triggered ones as black crosses.

    Those of the target class are larger and framed. Adversarial images are grey rings. Beyond ten
    classes colours repeat, and none but the target is named.
    """
    figure = Figure(figsize=(4.6 * len(maps), 4.8), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for panel, each in zip(panels, maps, strict=True):
        classes = np.unique(each.labels)
        for k in classes:
            points = each.clean[each.labels == k]
            named, color = len(classes) <= MOST_NAMED, f"C{k % 10}"
            if k == each.target:
                frame = {"edgecolors": "black", "linewidths": 0.6}
                panel.scatter(*points.T, s=26, color=color, label=f"clean {k}, target", **frame)
            else:
                panel.scatter(*points.T, s=10, color=color, label=f"clean {k}" if named else None)
        if each.adversarial is not None:
            rings = {"facecolors": "none", "edgecolors": "gray", "linewidths": 0.7}
            panel.scatter(*each.adversarial.T, s=14, label="adversarial", **rings)
        panel.scatter(
            *each.triggered.T, s=14, color="black", marker="x", linewidths=0.7, label="triggered"
        )
        panel.set_title(each.title)
        panel.set_xticks([])
        panel.set_yticks([])
    entries: dict[str, Artist] = {}  # panels of other data sets or targets have other names
    for panel in panels:
        handles, names = panel.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    columns = min(len(entries), 3 * len(maps))
    shown, names = list(entries.values()), list(entries)
    figure.legend(shown, names, loc="outside lower center", ncols=columns, fontsize="small")
    return figure


def plot_trigger(data: Digits) -> Figure:
    """Some test images whose class is not the target: clean, triggered, and the difference."""
    if data.attack is None or data.trigger is None or data.test_set.labels is None:
        raise ValueError("The digits of the demo have an attack and labels.")
    rows = data.attack.eligible(data.test_set.labels).nonzero().flatten()[:NUM_SAMPLES]
    clean = data.test_set.images[rows]
    triggered = data.trigger.poison(clean)
    difference = (triggered.int() - clean.int()).abs().to(torch.uint8)
    figure = Figure(figsize=(1.3 * NUM_SAMPLES, 4.1), layout="constrained")
    panels = figure.subplots(3, NUM_SAMPLES)
    names = ("clean", "triggered", "difference")
    for line, name, images in zip(panels, names, (clean, triggered, difference), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].set_ylabel(name)
    return figure


def png_base64(figure: Figure) -> str:
    """The figure as a PNG in base64, for a `data:` address."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
