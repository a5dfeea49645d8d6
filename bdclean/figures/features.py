"""Features of models in the plane, by t-SNE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

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
    title: str,
    features: Mapping[str, Tensor],
    labels: Tensor,
    seed: int,
    *,
    iterations: int = 1000,
    perplexity: float = 30.0,
    target: int | None = None,
) -> FeatureMap:
    """One t-SNE of all groups of images together.

    Args:
        title: Of the model.
        features: (N_g, D) of the groups `clean`, `triggered` and, where there are any,
            `adversarial`.
        labels: (N,), the classes of the clean ones.
        seed: Of the t-SNE.
        iterations: Of the t-SNE; the default is scikit-learn's.
        perplexity: Of the t-SNE; below the number of points.
        target: The class of the attack.
    """
    points = to_plane(list(features.values()), seed, iterations, perplexity)
    plane = dict(zip(features, points, strict=True))
    return FeatureMap(
        title,
        plane["clean"],
        labels.numpy(),
        plane["triggered"],
        plane.get("adversarial"),
        target,
    )


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
    from sklearn.manifold import TSNE

    # Cosine, as in the contrastive losses and in the probe, which both normalise features.
    points = torch.nn.functional.normalize(torch.cat(list(groups)), dim=1)
    tsne = TSNE(init="pca", random_state=seed, max_iter=iterations, perplexity=perplexity)
    plane = tsne.fit_transform(points.numpy())
    return list(np.split(plane, np.cumsum([len(group) for group in groups])[:-1]))


def plot_features(maps: Sequence[FeatureMap]) -> "Figure":
    """One panel per model: clean images coloured by class, triggered ones as black crosses.

    Those of the target class are larger and framed. Adversarial images are grey rings. Beyond ten
    classes colours repeat, and none but the target is named.
    """
    from matplotlib.figure import Figure

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
