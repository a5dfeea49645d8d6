"""German traffic signs (GTSRB) in the layout of their archives."""

import csv
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.sources import downloading, read_class_folder, read_files, require_layout
from bdclean.errors import DataError
from bdclean.types import View

_TREE = """\
  {root}/gtsrb/GTSRB/Final_Training/Images/00000 ... 00042/*.ppm
      39,209 images, those of the papers; from GTSRB_Final_Training_Images.zip, by hand
  or {root}/gtsrb/GTSRB/Training/00000 ... 00042/*.ppm
      26,640 images of the competition; what the download fetches
  {root}/gtsrb/GTSRB/Final_Test/Images/*.ppm
  {root}/gtsrb/GT-final_test.csv"""
_CLASSES = tuple(f"{k:05d}" for k in range(43))


class GTSRB(ImageDataModule):
    """GTSRB: traffic signs of 15 to 250 pixels in 43 unbalanced classes, resized to 32x32.

    The folder is torchvision's. There are two training archives: `GTSRB/Final_Training` (39,209
    images, used by the papers) is read when it is there, and otherwise `GTSRB/Training` (26,640
    images of the competition), which torchvision downloads; the sizes in the record tell which.
    The test set is the final one (12,630 images). A mirrored sign may mean something else, so
    nothing is ever flipped.

    Args:
        root: Folder that holds, or will hold, `gtsrb`.
        download: Fetch torchvision's archives when they are not there (190 MB and 90 MB).
        cache: Keep the decoded images in the user's cache folder.
        view: What training reads when the module asks for nothing else.
        **kwargs: Those of `ImageDataModule`.
    """

    name = "gtsrb"
    num_classes = 43
    input_size = 32
    mean = (0.3337, 0.3064, 0.3171)
    std = (0.2672, 0.2564, 0.2629)
    allow_flip = False

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        cache: bool = True,
        view: View = View("train", augmentation="crop", labels=True),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(view=view, **kwargs)
        self.root, self.download, self.cache = str(Path(root).expanduser()), download, cache

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "gtsrb"

    @property
    def _train_folder(self) -> Path:
        final = self._folder / "GTSRB" / "Final_Training" / "Images"
        return final if final.is_dir() else self._folder / "GTSRB" / "Training"

    def prepare_data(self) -> None:
        """Downloads what is missing when asked to, and decodes once; on one process of a node."""
        super().prepare_data()
        if self.download:
            with downloading("GTSRB", self.root, _TREE):
                if not self._train_folder.is_dir():
                    datasets.GTSRB(self.root, "train", download=True)
                datasets.GTSRB(self.root, "test", download=True)
        if self.cache:
            _ = self.stored, self.test_set

    def read_train(self) -> ImageSet:
        """The training images by class."""
        folder = self._train_folder
        self._require(*(folder / name for name in _CLASSES))
        return read_class_folder(
            folder, self.input_size, classes=_CLASSES, resizing="stretch", reading=self.reading
        )

    def read_test(self) -> ImageSet:
        """The test images in the order of their table."""
        folder, table = self._folder / "GTSRB/Final_Test/Images", self._folder / "GT-final_test.csv"
        self._require(folder, table)
        with table.open(newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter=";", skipinitialspace=True))
        try:
            files = [folder / row["Filename"] for row in rows]
            labels = torch.tensor([int(row["ClassId"]) for row in rows])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{table} has no columns Filename and ClassId, separated by semicolons; take "
                "the table of GTSRB_Final_Test_GT.zip."
            ) from error
        return read_files(
            folder, files, labels, self.input_size, resizing="stretch", reading=self.reading
        )

    def _require(self, *paths: Path) -> None:
        require_layout(paths, name="GTSRB", root=self.root, tree=_TREE)
