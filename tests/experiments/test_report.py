"""Table, page and pictures from rows that were made up."""

from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from bdclean.experiments import report
from bdclean.experiments.features import FeatureMap, plot_features, plot_trigger
from bdclean.experiments.stages import DemoSettings, make_data

ROWS = [
    report.Row("victim", "1,000 (100 poisoned)", 98.25, 100.0, 0.0, 400, 360, 21.04),
    report.Row("BCU <new>", "none", 97.0, 1.25, 96.0, 400, 360, 9.96),
]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_shows_the_rows(width):
    console = Console(file=StringIO(), width=width)
    console.print(report.table(ROWS))
    lines = console.file.getvalue().splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("│┃").split("│")) for line in lines]
    assert ("victim", "1,000 (100 poisoned)", "98.2", "100.0", "0.0", "21.0") in cells
    assert ("BCU <new>", "none", "97.0", "1.2", "96.0", "10.0") in cells
    assert len(lines) == len(ROWS) + 4  # three rules and the head
    assert all(len(line) <= 80 for line in lines)


def test_a_markup_sign_is_escaped(tmp_path):
    path = tmp_path / "page.html"
    picture = report.Picture("a & b", "caption", "AAAA")
    report.write_html(path, "title", "intro {braces}", ROWS, [picture], '{"a": "<b>"}')
    page = path.read_text()
    assert "BCU &lt;new&gt;" in page
    assert "<new>" not in page
    assert "a &amp; b" in page
    assert "intro {braces}" in page
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_the_note_counts_the_images():
    assert "400 clean" in report.note(ROWS)
    assert "360 triggered" in report.note(ROWS)


def test_the_picture_of_the_trigger():
    settings = DemoSettings()
    data, side = make_data(settings, 0), settings.patch_size
    panels = plot_trigger(data).axes
    clean, triggered, difference = (
        [torch.as_tensor(np.asarray(panel.images[0].get_array())).int() for panel in row]
        for row in (panels[:6], panels[6:12], panels[12:])
    )
    for before, after, gap in zip(clean, triggered, difference, strict=True):
        assert torch.equal((after - before).abs(), gap)
        assert gap.any()
        gap[-side:, -side:] = 0
        assert not gap.any()


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
