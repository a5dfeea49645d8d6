"""Data modules: images by role, with labels only where a role may show them."""

from bdclean.data.cifar import CIFAR10, CIFAR100
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.digits import Digits
from bdclean.data.folder import ImageFolder
from bdclean.data.gtsrb import GTSRB
from bdclean.data.imagenet import ImageNet100, Imagenette
from bdclean.data.images import ImageSet, RoleImages
from bdclean.data.splits import Splits
from bdclean.data.tinyimagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "GTSRB",
    "Digits",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet100",
    "ImageSet",
    "Imagenette",
    "RoleImages",
    "Splits",
    "TinyImageNet",
]
