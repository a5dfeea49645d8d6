"""Architectures: building, loading, the order of their stages, and copies for attack loops."""

from bdclean.backbones.build import build, load_model, save_model
from bdclean.backbones.fold import AttackCopy, attack_copy
from bdclean.backbones.resnet import ResNet, resnet18, resnet34
from bdclean.backbones.split import ModelInfo, Normalize, SplitModel, Stem
from bdclean.backbones.stages import Stage, ordered_stages

__all__ = [
    "AttackCopy",
    "ModelInfo",
    "Normalize",
    "ResNet",
    "SplitModel",
    "Stage",
    "Stem",
    "attack_copy",
    "build",
    "load_model",
    "ordered_stages",
    "resnet18",
    "resnet34",
    "save_model",
]
