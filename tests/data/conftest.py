"""Small pictures that the tests of data sets write."""

import numpy as np
import pytest
from PIL import Image


def _write(path, level, size=(12, 12), mode="RGB"):
    width, height = size
    pixels = np.full((height, width, 3), level, dtype=np.uint8)
    pixels[:, : width // 2] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="session")
def write():
    """Writes a picture of one level, black left of the middle: a mirror image differs."""
    return _write


@pytest.fixture(scope="session")
def levels():
    """The levels of written pictures, as read again: (N, 3, H, W) -> N numbers."""
    return lambda images: images[:, 0, images.shape[2] // 2, -1].tolist()
