"""Tiny-ImageNet in the layout of its archive."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.utils import download_and_extract_archive

from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.layout import class_folders
from bdclean.data.sources import downloading, read_class_folder, read_files, require_layout
from bdclean.errors import DataError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_TREE = """\
  {root}/tiny-imagenet-200/train/WNID/images/*.JPEG   (200 classes)
  {root}/tiny-imagenet-200/val/images/*.JPEG and val/val_annotations.txt
  or {root}/tiny-imagenet-200/val/WNID/*.JPEG"""


class TinyImageNet(ImageDataModule):
    """Tiny-ImageNet: 100,000 training images of 64x64 pixels in 200 classes.

    The labels of its test images are not public, so the 10,000 validation images are the test
    set, as usual. They may lie as in the archive or, repacked, in a folder for each class.
    Classes are numbered in the sorted order of their WordNet ids.

    Args:
        root: Folder that holds, or will hold, `tiny-imagenet-200`.
        download: Fetch the archive (248 MB) when it is not there.
        cache: Keep the decoded images in the user's cache folder.
        **kwargs: Those of `ImageDataModule`.
    """

    name = "tinyimagenet"
    num_classes = 200
    input_size = 64
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        cache: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.download, self.cache = str(Path(root).expanduser()), download, cache

    @property
    def _folder(self) -> Path:
        return Path(self.root) / "tiny-imagenet-200"

    def prepare_data(self) -> None:
        """Downloads the archive when asked to, and decodes once; on one process of a node."""
        super().prepare_data()
        if self.download and not self._folder.is_dir():
            with downloading("Tiny-ImageNet", self.root, _TREE):
                download_and_extract_archive(URL, self.root, md5=MD5)
        if self.cache:
            _ = self.stored, self.test_set

    def read_train(self) -> ImageSet:
        """The training images by class."""
        return self._read_classes(self._folder / "train", self._classes())

    def read_test(self) -> ImageSet:
        """The validation images: in the order of their table, or by class where repacked."""
        classes, folder = self._classes(), self._folder / "val"
        if (folder / classes[0]).is_dir():
            self._require(*(folder / name for name in classes))
            return self._read_classes(folder, classes)
        table = folder / "val_annotations.txt"
        self._require(folder / "images", table)
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        number = {name: k for k, name in enumerate(classes)}
        try:
            files = [folder / "images" / row[0] for row in rows]
            labels = torch.tensor([number[row[1]] for row in rows])
        except (IndexError, KeyError) as error:
            raise DataError(
                f"{table} does not say FILE, tab, WNID of a training class on each line; unpack "
                "the archive again."
            ) from error
        return read_files(folder, files, labels, self.input_size, reading=self.reading)

    def _classes(self) -> list[str]:
        self._require(self._folder / "train")
        classes = class_folders(self._folder / "train")
        if len(classes) != self.num_classes:
            raise DataError(
                f"{self._folder}/train has {len(classes)} class folders instead of "
                f"{self.num_classes}; unpack the archive again, or read a subset through "
                "bdclean.data.ImageFolder."
            )
        return classes

    def _read_classes(self, folder: Path, classes: Sequence[str]) -> ImageSet:
        return read_class_folder(folder, self.input_size, classes=classes, reading=self.reading)

    def _require(self, *paths: Path) -> None:
        require_layout(paths, name="Tiny-ImageNet", root=self.root, tree=_TREE)
