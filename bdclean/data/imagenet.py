"""Subsets of ImageNet at 224 pixels: Imagenette and ImageNet-100."""

import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from torchvision import datasets

from bdclean.checks import check_least
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.sources import downloading, read_class_folder, require_layout
from bdclean.errors import ConfigError
from bdclean.types import View

_IMAGENETTE_FOLDERS = {
    "full": "imagenette2",
    "320px": "imagenette2-320",
    "160px": "imagenette2-160",
}
_IMAGENETTE_TREE = """\
  {{root}}/{folder}/train/WNID/*.JPEG   (10 classes)
  {{root}}/{folder}/val/WNID/*.JPEG"""
_IMAGENETTE_CLASSES = (
    "n01440764",  # tench
    "n02102040",  # English springer
    "n02979186",  # cassette player
    "n03000684",  # chain saw
    "n03028079",  # church
    "n03394916",  # French horn
    "n03417042",  # garbage truck
    "n03425413",  # gas pump
    "n03445777",  # golf ball
    "n03888257",  # parachute
)
_IMAGENET100_TREE = """\
  {root}/train/WNID/*.JPEG   (the classes of the list; others are left alone)
  {root}/val/WNID/*.JPEG"""


class Imagenette(ImageDataModule):
    """Imagenette (version 2): 9,469 training and 3,925 validation images in 10 easy classes.

    The validation images are the test set. Both sides are resized to `input_size`, whatever the
    proportions. At 224 pixels the training images take 1.4 GB.

    Args:
        root: Folder that holds, or will hold, `imagenette2`, `imagenette2-320` or `-160`.
        size: Which of the three archives: the shorter side of its images.
        input_size: Side of the images for the network, in pixels.
        download: Fetch the archive (1.5 GB, 340 MB or 100 MB) when it is not there.
        cache: Keep the decoded images in the user's cache folder.
        eval_batch_size: Images per step and device in evaluation.
        exif_orientation: Turn photos as viewers do; the papers do not.
        **kwargs: Those of `ImageDataModule`.
    """

    name = "imagenette"
    num_classes = 10
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str = "data",
        size: Literal["full", "320px", "160px"] = "full",
        input_size: int = 224,
        download: bool = False,
        cache: bool = True,
        eval_batch_size: int = 100,
        exif_orientation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            eval_batch_size=eval_batch_size, exif_orientation=exif_orientation, **kwargs
        )
        self.root, self.size = str(Path(root).expanduser()), size
        self.input_size = check_least("input_size", input_size, 1)
        self.download, self.cache = download, cache
        self._tree = _IMAGENETTE_TREE.format(folder=_IMAGENETTE_FOLDERS[size])

    @property
    def _folder(self) -> Path:
        return Path(self.root) / _IMAGENETTE_FOLDERS[self.size]

    def prepare_data(self) -> None:
        """Downloads the archive when asked to, and decodes once; on one process of a node."""
        super().prepare_data()
        if self.download and not self._folder.is_dir():
            with downloading("Imagenette", self.root, self._tree):
                datasets.Imagenette(self.root, "train", self.size, download=True)
        if self.cache:
            _ = self.stored, self.test_set

    def read_train(self) -> ImageSet:
        """The training images by class."""
        return self._read("train")

    def read_test(self) -> ImageSet:
        """The validation images by class."""
        return self._read("val")

    def _read(self, part: str) -> ImageSet:
        folder, classes = self._folder / part, _IMAGENETTE_CLASSES
        paths = [folder / name for name in classes]
        require_layout(paths, name="Imagenette", root=self.root, tree=self._tree)
        return read_class_folder(
            folder, self.input_size, classes=classes, resizing="stretch", reading=self.reading
        )


class ImageNet100(ImageDataModule):
    """A hundred classes of ImageNet: about 126,700 training and 5,000 validation images.

    Reads a folder of these classes, or of all ImageNet, as `torchvision.datasets.ImageNet` lays
    it out; licence and size forbid a download. The validation images are the test set. Classes
    are numbered in the sorted order of their WordNet ids, so that 6 is the lorikeet (n01820546).

    Every image is stored with its shorter side resized to 8/7 of `input_size` (256 for 224) and
    its centre cropped, the usual test pipeline. The usual training pipeline crops at random from
    the original instead; here the augmentation `imagenet` crops from the stored image, because
    a trigger must be stamped at its final size before any augmentation. The decoded training set
    (19 GB) is mapped from the user's cache folder and never held in memory as a whole.

    Args:
        root: Folder that holds `train` and `val`.
        class_list: Text file of WordNet ids, one a line; None takes the 100 classes of Tian et
            al. (CMC, ECCV 2020), which are also those of Saha et al. and of CBD.
        input_size: Side of the images in pixels.
        cache: Keep the decoded images in the user's cache folder; false needs the memory.
        view: What training reads when the module asks for nothing else.
        eval_batch_size: Images per step and device in evaluation.
        exif_orientation: Turn photos as viewers do; the papers do not.
        **kwargs: Those of `ImageDataModule`.
    """

    name = "imagenet100"
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str = "data/imagenet",
        class_list: str | None = None,
        input_size: int = 224,
        cache: bool = True,
        view: View = View("train", augmentation="imagenet", labels=True),  # noqa: B008  (frozen)
        eval_batch_size: int = 100,
        exif_orientation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            view=view,
            eval_batch_size=eval_batch_size,
            exif_orientation=exif_orientation,
            **kwargs,
        )
        self.root, self.cache = str(Path(root).expanduser()), cache
        self.input_size = check_least("input_size", input_size, 1)
        self.classes = _read_list(class_list)
        self.num_classes = len(self.classes)

    def prepare_data(self) -> None:
        """Decodes once; on one process of a node."""
        super().prepare_data()
        if self.cache:
            _ = self.stored, self.test_set

    def read_train(self) -> ImageSet:
        """The training images by class."""
        return self._read("train")

    def read_test(self) -> ImageSet:
        """The validation images by class."""
        return self._read("val")

    def _read(self, part: str) -> ImageSet:
        folder = Path(self.root) / part
        require_layout(
            (folder / name for name in self.classes),
            name="ImageNet-100",
            root=self.root,
            tree=_IMAGENET100_TREE,
            downloads=False,
        )
        return read_class_folder(
            folder, self.input_size, classes=self.classes, resizing="imagenet", reading=self.reading
        )


def _read_list(file: str | None) -> tuple[str, ...]:
    """WordNet ids of a text file, sorted."""
    if file is None:
        text = resources.files("bdclean.data").joinpath("imagenet100.txt").read_text()
    else:
        try:
            text = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"class_list={file}: it cannot be read ({error}); give a text file of WordNet ids."
            ) from error
    words = text.split()
    odd = [word for word in words if not re.fullmatch(r"n\d{8}", word)]
    if odd or len(set(words)) != len(words) or len(words) < 2:
        raise ConfigError(
            f"class_list={file}: it must hold two or more WordNet ids such as n01820546, one a "
            f"line and each once{f', not {odd[0]!r}' if odd else ''}."
        )
    return tuple(sorted(words))
