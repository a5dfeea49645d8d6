"""The handwritten digits that come inside scikit-learn: real images without a download."""

import torch
from torch.nn.functional import interpolate

from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet

_NUM_TEST = 397
_SPLIT_SEED = 0


class Digits(ImageDataModule):
    """1,797 digits of 8x8 pixels (UCI Optical Recognition of Handwritten Digits), as 32x32 RGB.

    The first use of a fixed permutation sets 397 images aside as the test set, which leaves
    1,400 to train on. See `ImageDataModule` for the arguments.
    """

    name = "digits"
    num_classes = 10
    input_size = 32
    mean = (0.305, 0.305, 0.305)
    std = (0.340, 0.340, 0.340)

    def read_train(self) -> ImageSet:
        """The 1,400 training digits."""
        return _read(slice(_NUM_TEST, None))

    def read_test(self) -> ImageSet:
        """The 397 test digits."""
        return _read(slice(0, _NUM_TEST))


def _read(part: slice) -> ImageSet:
    from sklearn.datasets import load_digits  # half a second that other data sets do not need

    grey, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    rows = order[part]
    pixels = torch.from_numpy(grey).float().view(-1, 1, 8, 8)[rows] / 16
    large = interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, torch.from_numpy(labels).long()[rows])
