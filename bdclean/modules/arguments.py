"""The arguments of a module in its checkpoints: plain values there, groups when it is loaded."""

import copy
import inspect
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from lightning import LightningModule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class KeepsArguments(LightningModule):
    """A LightningModule whose checkpoints load without unpickling."""

    def save_arguments(self, *ignore: str) -> None:
        """Keeps the arguments of the calling `__init__` in checkpoints, as plain values.

        Groups become dictionaries, so that a checkpoint loads without unpickling;
        `load_from_checkpoint` makes groups of them again. `ignore` names those that no file holds.
        """
        frame = inspect.currentframe()
        assert frame is not None  # noqa: S101  (CPython has frames)
        self.save_hyperparameters(ignore=list(ignore), frame=frame.f_back)
        again = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        self._set_hparams(_plain(dict(self.hparams)) | again)
        self._hparams_initial = copy.deepcopy(self._hparams)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's; an argument that is changed may be a group as well as a dictionary.

        Args:
            checkpoint_path: The file.
            args: Of Lightning's.
            kwargs: Of Lightning's, and arguments of the module that replace those in the file.
        """
        loaded: Self = super().load_from_checkpoint(checkpoint_path, *args, **_plain(kwargs))
        return loaded


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """With dictionaries in place of groups."""
    return {name: asdict(v) if _is_group(v) else v for name, v in arguments.items()}


def _is_group(value: Any) -> "TypeGuard[DataclassInstance]":
    return is_dataclass(value) and not isinstance(value, type)
