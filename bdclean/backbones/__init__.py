"""Architectures: building, loading, the order of their blocks, copies for PGD."""

from bdclean.backbones.blocks import Block, ordered_blocks
from bdclean.backbones.build import build, build_for, load_model, save_model
from bdclean.backbones.exporting import (
    export_hub,
    export_onnx,
    export_state,
    library_state,
)
from bdclean.backbones.fold import FrozenCopy, frozen_copy
from bdclean.backbones.inspected import Candidate, Inspection, inspect
from bdclean.backbones.layout import Layout, save_like, written_back
from bdclean.backbones.resnet import ResNet, resnet18, resnet34
from bdclean.backbones.split import ModelInfo, Normalize, SplitModel, Stem

__all__ = [
    "Block",
    "Candidate",
    "FrozenCopy",
    "Inspection",
    "Layout",
    "ModelInfo",
    "Normalize",
    "ResNet",
    "SplitModel",
    "Stem",
    "build",
    "build_for",
    "export_hub",
    "export_onnx",
    "export_state",
    "frozen_copy",
    "inspect",
    "library_state",
    "load_model",
    "ordered_blocks",
    "resnet18",
    "resnet34",
    "save_like",
    "save_model",
    "written_back",
]
