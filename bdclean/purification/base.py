"""What all purifiers share: the suspect file, the frozen teacher, checkpoints, the data view."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from bdclean.backbones import ModelInfo, SplitModel, build
from bdclean.backbones.source import FreshSource, WeightsSource
from bdclean.errors import ConfigError
from bdclean.metrics.evaluation import BackdoorModule
from bdclean.metrics.fitting import (
    own_epochs,
    scan,
    share_buffers,
    viewable_data,
    whole_epochs,
)
from bdclean.types import Batch, View

_RECORD = "bdclean_purifier"  # our entries in a checkpoint
_ENDED = "bdclean_ended"


class Purifier(BackdoorModule, ABC):
    """Purifies the model of a weights file. Subclasses add the training.

    The file is read in `setup("fit")`, so that a restored checkpoint wins over it. Checkpoints
    carry the description of the network: evaluating a run needs its checkpoint alone. In
    evaluation without a checkpoint, the suspect model itself is evaluated.

    Args:
        source: The suspect file, or a new network for a method that starts from data alone.
            Subclasses take its fields as plain arguments, which `save_hyperparameters` stores.

    Attributes:
        model: The student, which is purified.
        teacher: The suspect, frozen and in evaluation mode, where the method needs it.
        is_student: Whether `model` is the student, finished or not, and not the suspect as it came.
    """

    teacher: SplitModel  # None where there is none; as `model`

    def __init__(self, source: WeightsSource | FreshSource) -> None:
        super().__init__()
        self.source = source
        self.register_module("teacher", None)
        self.is_student = self._ended = False

    @property
    def purified(self) -> bool:
        """Whether the method ran to its end: `model` is its product."""
        return self._ended

    @property
    @abstractmethod
    def total_epochs(self) -> int:
        """Epochs of the whole fit."""

    @abstractmethod
    def first_view(self) -> View:
        """What training reads at its start."""

    @abstractmethod
    def make_student(self, suspect: SplitModel) -> SplitModel:
        """Turns a copy of the suspect, which it may change, into the student."""

    @property
    def needs_teacher(self) -> bool:
        """Whether training needs the suspect beside the student."""
        return True

    def freeze_parts(self) -> None:
        """Freezes what never trains; called whenever the networks were built."""

    # ------------------------------------------------------------------ networks

    def setup(self, stage: str) -> None:
        """Reads the suspect; see the class.

        Raises:
            ConfigError: If the Trainer has fitted before: it would train no further epoch.
        """
        if stage == "fit":
            if self.trainer.current_epoch:
                raise ConfigError(
                    f"This Trainer has trained {self.trainer.current_epoch} epochs already; make a "
                    "new Trainer for a new purification."
                )
            own_epochs(self.trainer, self.total_epochs)
            # The teacher is in evaluation mode on purpose; Lightning warns about such modules.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
            suspect = self.source.load()
            teacher = suspect.copy() if self.needs_teacher else None
            self._install(self.make_student(suspect), teacher)
            self.is_student, self._ended = True, False
        elif self._modules["model"] is None and self.source.is_there:
            self._install(self.source.load(), None)

    def _install(self, model: SplitModel, teacher: SplitModel | None) -> None:
        self.model = _channels_last(model.train())
        self.register_module("teacher", None)
        if teacher is not None:
            self.teacher = _channels_last(teacher.requires_grad_(False).eval())
        self.freeze_parts()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the description of the networks, and whether the method has ended."""
        super().on_save_checkpoint(checkpoint)
        networks = {"model": self.model}
        if self._modules["teacher"] is not None:
            networks["teacher"] = self.teacher
        checkpoint[_RECORD] = {name: net.info.to_metadata() for name, net in networks.items()}
        checkpoint[_ENDED] = self._ended

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the networks whose weights are restored next.

        Raises:
            ConfigError: If the checkpoint is not one of a purifier.
        """
        record = checkpoint.get(_RECORD)
        if record is None:
            raise ConfigError(
                "ckpt_path: this checkpoint was not written by a purification run. A model to be "
                "purified comes in through model.weights."
            )
        networks = {
            name: build(ModelInfo.from_metadata(metadata)) for name, metadata in record.items()
        }
        self._install(networks["model"], networks.get("teacher"))
        self.is_student = True
        self._ended = checkpoint.get(_ENDED, True)  # earlier versions did not tell

    def on_predict_start(self) -> None:
        """Refuses to predict without a model.

        Raises:
            ConfigError: If neither weights nor a checkpoint were given.
        """
        if self._modules["model"] is None:
            raise ConfigError("model.weights is not set, and there is no --ckpt_path.")

    # ------------------------------------------------------------------ data

    def on_fit_start(self) -> None:
        """Asks the data module for the first view."""
        self.request(self.first_view())

    def on_train_epoch_end(self) -> None:
        """Notes the end of the method, before the checkpoint of this epoch is written."""
        self._ended = whole_epochs(self.trainer) >= self.total_epochs

    def on_train_end(self) -> None:
        """Leaves the same model on all devices."""
        share_buffers(self.model)
        # Again: a run that goes on behind its last batch has no epoch to end.
        self._ended = whole_epochs(self.trainer) >= self.total_epochs

    def request(self, view: View) -> None:
        """Makes the next training loader serve `view`."""
        viewable_data(self.trainer).set_view(view)

    def scan(self, view: View, *, shared: bool = False) -> Iterator[Batch]:
        """All rows of `view`, un-augmented, on the device and in the same order on every rank.

        Where they are `shared`, a rank gets its part of the batches only.
        """
        return scan(self.trainer, view, self.device, shared=shared)

    def log_terms(self, **terms: Tensor) -> None:
        """Logs the mean over the epoch of each term, as `train/<name>`."""
        for name, term in terms.items():
            self.log(
                f"train/{name}",
                term.detach(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                sync_dist=True,
            )

    def protocol(self) -> dict[str, Any]:
        """Adds whether the method ran to its end."""
        return super().protocol() | {"purified": self.purified}


def check_choice(key: str, value: Any, allowed: Any) -> Any:
    """Returns `value` if it is one of the values of the Literal `allowed`.

    Raises:
        ConfigError: If it is not; YAML is checked before, but Python is not.
    """
    if value not in get_args(allowed):
        raise ConfigError(f"{key}={value!r}: it must be one of {', '.join(get_args(allowed))}.")
    return value


def check_share(key: str, value: float) -> float:
    """Returns `value` if it is above 0 and at most 1.

    Raises:
        ConfigError: If it is not.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{key}={value}: it must be above 0 and at most 1.")
    return value


def check_add_up(key: str, shares: Mapping[str, float]) -> None:
    """Checks weights, called `<key>_<name>`, that are shares of a whole.

    Raises:
        ConfigError: If one is below 0 or they do not add up to 1.
    """
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        given = ", ".join(f"{key}_{name}={value}" for name, value in shares.items())
        raise ConfigError(f"{given}: they must be 0 or above and add up to 1.")


def _channels_last(model: SplitModel) -> SplitModel:
    model.to(memory_format=torch.channels_last)
    return model
