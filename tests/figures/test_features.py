"""Features in the plane, and the picture of them."""

from dataclasses import replace

import numpy as np
import torch

from bdclean.figures.features import FeatureMap, feature_map, plot_features, to_plane


def test_groups_keep_their_order_in_the_plane():
    generator = torch.Generator().manual_seed(0)
    near, far = (torch.randn(30, 8, generator=generator) * 0.05 + s for s in (1.0, 0.0))
    far = far + torch.tensor([5.0, -5, 5, -5, 5, -5, 5, -5])
    one, two = to_plane([near, far], seed=0, iterations=300, perplexity=10)
    assert one.shape == two.shape == (30, 2)
    between = np.linalg.norm(one.mean(0) - two.mean(0))
    assert between > max(one.std(), two.std())


def test_a_map_holds_every_group_in_its_place():
    generator = torch.Generator().manual_seed(0)
    groups = {
        name: torch.randn(count, 8, generator=generator)
        for name, count in (("clean", 20), ("triggered", 12), ("adversarial", 5))
    }
    settings = {"seed": 3, "iterations": 250, "perplexity": 5}
    points = to_plane(list(groups.values()), **settings)
    found = feature_map("one", groups, torch.arange(20), target=4, **settings)
    assert np.array_equal(found.clean, points[0])
    assert np.array_equal(found.triggered, points[1])
    assert np.array_equal(found.adversarial, points[2])
    assert (found.title, found.labels.tolist(), found.target) == ("one", [*range(20)], 4)
    del groups["adversarial"]
    assert feature_map("one", groups, torch.arange(20), **settings).adversarial is None


def test_the_map_colours_classes_and_marks_the_triggered():
    clean = np.arange(12, dtype=np.float32).reshape(6, 2)
    labels = np.array([0, 0, 3, 3, 3, 7])
    triggered = np.ones((4, 2), dtype=np.float32)
    figure = plot_features([FeatureMap("one", clean, labels, triggered)] * 2)
    assert [panel.get_title() for panel in figure.axes] == ["one", "one"]
    points = figure.axes[0].collections
    assert [p.get_label() for p in points] == ["clean 0", "clean 3", "clean 7", "triggered"]
    assert [len(p.get_offsets()) for p in points] == [2, 3, 1, 4]
    assert np.array_equal(points[1].get_offsets(), clean[labels == 3])


def test_many_classes_are_not_named():
    points = np.zeros((40, 2), dtype=np.float32)
    for classes, named in ((10, 12), (20, 2)):
        each = FeatureMap("one", points, np.arange(40) % classes, points[:3], points[:2])
        (legend,) = plot_features([each]).legends
        assert len(legend.get_texts()) == named
        (legend,) = plot_features([replace(each, target=3), replace(each, target=1)]).legends
        names = [text.get_text() for text in legend.get_texts()]
        assert len(names) == named + 2
        assert names.count("clean 3, target") == 1
