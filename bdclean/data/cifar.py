"""CIFAR-10 and CIFAR-100 from their own archives, through torchvision."""

from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.sources import downloading
from bdclean.errors import DataError


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Args:
        root: Folder that holds, or will hold, the folder of the archive: `cifar-10-batches-py`, or
            `cifar-100-python` of CIFAR-100.
        download: Fetch the archive (170 MB) when it is not there.
        **kwargs: Those of `ImageDataModule`.
    """

    name = "cifar10"
    num_classes = 10
    input_size = 32
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    _title = "CIFAR-10"
    _loader = datasets.CIFAR10

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.download = str(Path(root).expanduser()), download

    def prepare_data(self) -> None:
        """Downloads the archive when asked to; on one process."""
        super().prepare_data()
        if self.download:
            with downloading(self._title, self.root, f"{{root}}/{self._loader.base_folder}"):
                self._loader(self.root, train=True, download=True)

    def read_train(self) -> ImageSet:
        """The training images, in the archive's order."""
        return self._read(train=True)

    def read_test(self) -> ImageSet:
        """The test images, in the archive's order."""
        return self._read(train=False)

    def _read(self, *, train: bool) -> ImageSet:
        try:
            stored = self._loader(self.root, train=train)
        except RuntimeError as error:
            raise DataError(
                f"root={self.root}: no intact {self._title} below; expected "
                f"{self.root}/{self._loader.base_folder}. Give the folder above it, or set "
                "download to true."
            ) from error
        images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(stored.targets), classes=tuple(stored.classes))


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 fine classes.

    The archive (169 MB) lies in `cifar-100-python`; the arguments are those of `CIFAR10`.
    """

    name = "cifar100"
    num_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    _title = "CIFAR-100"
    _loader = datasets.CIFAR100
