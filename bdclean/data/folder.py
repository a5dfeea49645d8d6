"""Any folder of images."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from bdclean.checks import check_channels, check_least
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.layout import (
    Layout,
    class_folders,
    empty_classes,
    find_layout,
    has_images,
    require_images,
)
from bdclean.data.sources import read_class_folder
from bdclean.errors import ConfigError, DataError


class ImageFolder(ImageDataModule):
    """Images as `root/train/CLASS/*.jpg` and `root/test/CLASS/*.jpg`, read into memory.

    The two folders may be called `Train`, `training`, `train_images` and the like. Without a folder
    of training images, their class folders are those of `root` itself, and there are no test
    images.

    Images of another size are cropped to their centre square and resized. Decoded images
    are kept in the user's cache folder, under a key that changes when a file does.

    Args:
        root: The folder above `train` and `test`, or above the classes. None when there are
            only a defender's images (`defense_root`), which then need `num_classes`.
        num_classes: K, when there is no `root` to count the class folders of, or when an empty one
            is to keep its number.
        input_size: Side of the images in pixels.
        mean: Per channel, of pixels in [0, 1]; the default is ImageNet's.
        std: Per channel, of pixels in [0, 1]; the default is ImageNet's.
        cache: Keep the decoded images.
        allow_flip: False where a mirrored image may belong to another class (traffic signs);
            augmentations then run without horizontal flips.
        **kwargs: Those of `ImageDataModule`.
    """

    name = "folder"

    def __init__(
        self,
        root: str | None = None,
        num_classes: int | None = None,
        input_size: int = 32,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        cache: bool = True,
        allow_flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_least("input_size", input_size, 1)
        check_channels(mean, std)
        if num_classes is not None:
            check_least("num_classes", num_classes, 1)
        self.root = None if root is None else str(Path(root).expanduser())
        self.input_size, self.mean, self.std = input_size, mean, std
        self.cache, self.allow_flip = cache, allow_flip
        self.num_classes = self._count_classes(num_classes)

    def _count_classes(self, given: int | None) -> int:
        if self.root is None:
            if self.defense_root is None:
                raise ConfigError(
                    "root=null: it must be a folder with train/ and test/, unless defense_root is "
                    "a folder of photos without labels."
                )
            return 1 if given is None else given
        train, test = self._layout.train, self._layout.test
        names = class_folders(train)
        if given is None:
            empty = empty_classes(train, names)  # an attack may have taken all images of a class
            gone = [n for n in empty if test is None or not has_images(test / n)]
            require_images(train, gone, f", or keep it with --data.num_classes {len(names)}")
        elif given != len(names):
            raise ConfigError(
                f"num_classes={given}: {train} has {len(names)} class folders; leave num_classes "
                "out, or correct root."
            )
        return len(names)

    @cached_property
    def _layout(self) -> Layout:
        return find_layout(Path(str(self.root)))

    @property
    def has_training_images(self) -> bool:
        """Whether `root` is given."""
        return self.root is not None

    @property
    def has_test_images(self) -> bool:
        """Whether there is a folder of test images below `root`."""
        return self.root is not None and self._layout.test is not None

    def prepare_data(self) -> None:
        """Decodes the training images once; on one process of a node."""
        super().prepare_data()
        if self.root is not None and self.cache:
            _ = self.stored

    def read_train(self) -> ImageSet:
        """The images below `root/train`."""
        self._require_root("train")
        return self._read(self._layout.train)

    def read_test(self) -> ImageSet:
        """The images below `root/test`, with the classes of `root/train`."""
        self._require_root("test")
        train, test = self._layout.train, self._test_folder()
        classes, found = class_folders(train), class_folders(test)
        unused = empty_classes(train, set(classes) - set(found))  # as num_classes counts them
        odd = sorted(set(classes) ^ set(found) ^ set(unused))
        if odd:
            raise DataError(
                f"{train} and {test} differ in the class folders {odd[:5]}; both need the same "
                "ones."
            )
        empty = empty_classes(test, classes)
        if 0 < len(empty) < len(classes):
            rank_zero_warn(f"{test / empty[0]} holds no images, so its class is not measured.")
        return self._read(test, classes)

    def _require_root(self, part: str) -> None:
        if self.root is None:
            raise DataError(
                f"root=null: without it there are no {part} images; give it, or turn off what "
                "needs them, in a fit (--test_after_fit false; of CBD: --model.probe null)."
            )

    def _test_folder(self) -> Path:
        layout, root = self._layout, self.root
        if layout.test is not None:
            return layout.test
        if layout.flat:
            raise DataError(
                f"There are no test images, because {root} has no folder train and is taken to "
                "hold the training images; put them into train/ and test/, or turn off what needs "
                "a test set (--test_after_fit false)."
            )
        named = f"; name {layout.val} so, if it holds them" if layout.val is not None else ""
        raise DataError(
            f"No folder {root}/test. Expected {root}/test/CLASS/IMAGE.jpg, one folder a "
            f"class{named}; without test images, turn off what needs them "
            "(--test_after_fit false)."
        )

    def _read(self, folder: Path, classes: Sequence[str] | None = None) -> ImageSet:
        size, sparse = self.input_size, classes is not None
        return read_class_folder(folder, size, classes=classes, sparse=sparse, reading=self.reading)
