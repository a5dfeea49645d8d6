"""Any folder of images."""

from pathlib import Path
from typing import Any

from bdclean.checks import check_channels, check_least
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.sources import class_folders, read_class_folder
from bdclean.errors import ConfigError, DataError


class ImageFolder(ImageDataModule):
    """Images as `root/train/CLASS/*.jpg` and `root/test/CLASS/*.jpg`, read into memory.

    Without a folder `train`, the class folders of training images are those of `root` itself,
    and there are no test images.

    Images of another size are cropped to their centre square and resized. Decoded images
    are kept in the user's cache folder, under a key that changes when a file does.

    Args:
        root: The folder above `train` and `test`, or above the classes. None when there are
            only a defender's images (`defense_root`), which then need `num_classes`.
        num_classes: K, when there is no `root` to count the class folders of.
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
        found = len(class_folders(self._folder("train")))
        if given is not None and given != found:
            raise ConfigError(
                f"num_classes={given}: {self._folder('train')} has {found} class folders; leave "
                "num_classes out, or correct root."
            )
        return found

    @property
    def has_training_images(self) -> bool:
        """Whether `root` is given."""
        return self.root is not None

    @property
    def has_test_images(self) -> bool:
        """Whether there is a folder `test` below `root`."""
        return self.root is not None and (Path(self.root) / "test").is_dir()

    def prepare_data(self) -> None:
        """Decodes the training images once; on one process of a node."""
        super().prepare_data()
        if self.root is not None and self.cache:
            _ = self.stored

    def read_train(self) -> ImageSet:
        """The images below `root/train`."""
        return self._read("train")

    def read_test(self) -> ImageSet:
        """The images below `root/test`, with the classes of `root/train`."""
        if self.root is not None:
            train, test = (class_folders(self._folder(part)) for part in ("train", "test"))
            if train != test:
                odd = sorted(set(train) ^ set(test))
                raise DataError(
                    f"{self.root}/train and {self.root}/test differ in the class folders "
                    f"{odd[:5]}; both need the same ones."
                )
        return self._read("test")

    def _folder(self, part: str) -> Path:
        root = Path(str(self.root))
        if part == "test" and (root / "train").is_dir() and not (root / part).is_dir():
            raise DataError(
                f"No folder {root}/test. Expected {root}/test/CLASS/IMAGE.jpg, one folder a class; "
                "without test images, turn off what needs them (--test_after_fit false)."
            )
        if (root / "train").is_dir() or not root.is_dir():
            return root / part
        if part == "train":
            return root
        raise DataError(
            f"There are no test images, because {root} has no folder train and is taken to hold "
            "the training images; put them into train/ and test/, or turn off what needs a test "
            "set (--test_after_fit false)."
        )

    def _read(self, part: str) -> ImageSet:
        if self.root is None:
            raise DataError(
                f"root=null: without it there are no {part} images; give it, or turn off what "
                "needs them, in a fit (--test_after_fit false, --model.probe null)."
            )
        return read_class_folder(self._folder(part), self.input_size, cache=self.cache)
