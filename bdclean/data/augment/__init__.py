"""Augmentation on the device, with parameters of its own for every image."""

from bdclean.data.augment.recipes import RECIPES, Augmentation, augment, named

__all__ = ["RECIPES", "Augmentation", "augment", "named"]
