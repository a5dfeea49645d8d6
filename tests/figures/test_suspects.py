import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.figures.suspects import draw_courses, draw_scores, draw_sheet

pytestmark = pytest.mark.filterwarnings("error")


def pixels(figure):
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_the_sheet_shows_the_pictures_in_order_with_their_captions():
    images = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    images[1, 0], images[11, 2] = 255, 255  # the second is red, the last one blue
    images[2, 1, :3] = 255  # the upper part of the third is green
    tiers = torch.tensor([0, 1, 2] + [0] * 9)
    figure = draw_sheet(images, [f"{k} → {k + 1}" for k in range(12)], tiers, "Heading")
    shown = pixels(figure)
    top = shown.shape[0] - 244 + 22 + 48  # middle of the pictures of the first line
    centers = [shown[top, 100 * k + 50].tolist() for k in range(10)]
    assert centers == [[0, 0, 0], [255, 0, 0], *[[0, 0, 0]] * 8]
    assert shown[top - 35, 250].tolist() == [0, 255, 0]
    assert shown[top + 35, 250].tolist() == [0, 0, 0]
    below = [shown[top + 122, 100 * k + 50].tolist() for k in range(3)]
    assert below == [[0, 0, 0], [0, 0, 255], [255, 255, 255]]
    (panel,) = figure.axes
    texts = [(text.get_text(), text.get_color()) for text in panel.texts]
    assert texts[:2] == [("0 → 1", "black"), ("1 → 2", "crimson")]
    weights = [(text.get_color(), text.get_fontweight()) for text in panel.texts[:3]]
    assert weights == [("black", "normal"), ("crimson", "normal"), ("crimson", "bold")]
    heading = figure.texts[0].get_text()
    assert heading == "Heading (label → proposed label, red if flagged, bold if likely)"
    none = draw_sheet(images[:1], ["0"], torch.ones(1), "Heading").texts[0].get_text()
    assert none == "Heading (label → proposed label, red if flagged)"


def test_histograms_count_every_group_of_every_score():
    score = torch.tensor([0.0, 0.0, 1.0, 2.0, math.inf, math.nan])
    groups = {"clean": torch.arange(6) < 3, "poisoned": torch.arange(6) >= 3}
    figure = draw_scores({"score": score, "consistency": torch.arange(6.0)}, groups)
    first, second = figure.axes
    assert first.get_title() == "score (2 not finite)"
    assert second.get_title() == "consistency"
    heights = [[sum(bar.get_height() for bar in bars) for bars in p.containers] for p in (first,)]
    assert heights == [[3, 1]]
    assert [first.containers[0][0].get_height(), first.containers[1][-1].get_height()] == [2, 1]
    labels = [text.get_text() for text in first.get_legend().get_texts()]
    assert labels == ["clean (3)", "poisoned (3)"]


def test_courses_have_a_panel_per_unit_and_are_in_order_of_time():
    rounds = {"flagged": {1: 75.0, 2: 25.0}, "TPR": {1: math.nan, 2: 100.0}}
    figure = draw_courses({"round": rounds, "epoch": {"val/acc": {3: 50.0, 1: 40.0}}})
    first, second = figure.axes
    assert [line.get_label() for line in first.lines] == ["flagged", "TPR"]
    assert second.lines[0].get_xydata().tolist() == [[1, 40], [3, 50]]
    assert (first.get_xlabel(), second.get_xlabel()) == ("round", "epoch")
    assert all(time == int(time) for time in first.get_xticks())
