"""Data modules: images by role, with labels only where a role may show them."""

from bdclean.data.cifar import CIFAR10
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.digits import Digits
from bdclean.data.folder import ImageFolder
from bdclean.data.images import ImageSet, RoleImages
from bdclean.data.splits import Splits

__all__ = [
    "CIFAR10",
    "Digits",
    "ImageDataModule",
    "ImageFolder",
    "ImageSet",
    "RoleImages",
    "Splits",
]
