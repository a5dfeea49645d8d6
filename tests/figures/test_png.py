"""A figure as a file, and what drawing costs those who do not draw."""

from io import BytesIO

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bdclean.errors import FileError
from bdclean.figures.png import save_png, to_png


@pytest.fixture
def figure():
    drawn = Figure(figsize=(2, 1))
    drawn.subplots().plot([1, 2])
    return drawn


def test_a_figure_is_a_png_of_its_size(figure):
    with Image.open(BytesIO(to_png(figure))) as image:
        assert (image.format, image.size) == ("PNG", (220, 110))


def test_it_is_written_whole_or_not_at_all(figure, tmp_path):
    path = tmp_path / "new" / "figure.png"
    save_png(figure, path)
    assert path.read_bytes() == to_png(figure)
    with pytest.raises(FileError, match="cannot be written"):
        save_png(figure, path / "deeper.png")
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_who_does_not_draw_loads_no_drawing(run_python):
    modules = ("features", "png", "suspects", "triggers")
    script = "import sys; "
    script += "".join(f"import bdclean.figures.{name}; " for name in modules)
    script += "print({'matplotlib', 'sklearn'} & {*sys.modules})"
    assert run_python("-c", script).strip() == "set()"
