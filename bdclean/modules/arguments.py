"""The arguments of a module in its checkpoints: plain values there, groups when it is loaded."""

import copy
from collections.abc import Collection
from dataclasses import asdict, is_dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeGuard

from lightning import LightningModule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def keep_arguments(module: LightningModule, frame: FrameType, ignore: Collection[str]) -> None:
    """Keeps the arguments of an `__init__` as hyper-parameters, which load without unpickling.

    Args:
        module: Is being made.
        frame: Of its `__init__`.
        ignore: Names of arguments that no file holds.
    """
    module.save_hyperparameters(ignore=list(ignore), frame=frame)
    again = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    module._set_hparams(plain(dict(module.hparams)) | again)
    vars(module)["_hparams_initial"] = copy.deepcopy(module._hparams)


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """With dictionaries in place of groups."""
    return {name: asdict(v) if _is_group(v) else v for name, v in arguments.items()}


def _is_group(value: Any) -> "TypeGuard[DataclassInstance]":
    return is_dataclass(value) and not isinstance(value, type)
