"""Words for sentences."""

import pytest

from bdclean.errors import counted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((0, "image"), "0 images"),
        ((1, "image"), "1 image"),
        ((2347, "image"), "2,347 images"),
        ((1, "entry", "entries"), "1 entry"),
        ((2, "class is", "classes are"), "2 classes are"),
    ],
)
def test_a_number_and_what_it_counts(words, said):
    assert counted(*words) == said
