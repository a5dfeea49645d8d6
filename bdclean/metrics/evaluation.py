"""The evaluation that every module of the package shares.

Two loaders, in this order: `clean` (images with their labels) and `triggered` (the same kind
of images with the trigger, their true labels, and the labels that the attacker wants).
Logged are `<stage>/acc` over the first, `<stage>/asr` and `<stage>/pa` over the second, in
percent; stage is `val` or `test`. Further loaders of an attack (`further_tests` of the data
module) log `<stage>/<name>`, the share of their images answered with the label counted there.
Nothing but integer counts is kept between batches.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from bdclean.errors import ConfigError
from bdclean.metrics.backdoor import (
    AttackSuccessRate,
    CleanAccuracy,
    HitRate,
    PoisonedAccuracy,
)
from bdclean.metrics.fitting import reopen_epoch
from bdclean.types import Batch, Findings

if TYPE_CHECKING:  # a name for annotations only: at run time metrics do not need the backbones
    from bdclean.backbones import SplitModel

Stage = Literal["val", "test"]
_TUNERS = (BatchSizeFinder, LearningRateFinder)
_AVERAGES = (StochasticWeightAveraging, WeightAveraging)


def loader_names(trainer: Trainer) -> tuple[str, ...]:
    """Names of the evaluation loaders, in their order."""
    data = getattr(trainer, "datamodule", None)
    return "clean", "triggered", *getattr(data, "further_tests", ())


class Scores(nn.Module):
    """The three metrics of one evaluation stage; a module, so that they follow the device."""

    def __init__(self) -> None:
        super().__init__()
        self.acc = CleanAccuracy()
        self.asr = AttackSuccessRate()
        self.pa = PoisonedAccuracy()
        self.further = nn.ModuleDict()

    def items(self) -> Iterator[tuple[str, HitRate]]:
        """Yields pairs of key and metric, in the order in which tables print them."""
        yield from (("acc", self.acc), ("asr", self.asr), ("pa", self.pa))
        for name, metric in self.further.items():
            assert isinstance(metric, HitRate)  # noqa: S101
            yield name, metric

    def update(self, loader: str, logits: Tensor, batch: Batch) -> None:
        """Counts one batch of the loader of that name."""
        if loader == "clean":
            self.acc.update(logits, batch["label"])
        elif loader == "triggered":
            self.asr.update(logits, batch["label"], batch["target"])
            self.pa.update(logits, batch["label"], batch["target"])
        else:
            self.further[loader](logits, batch["label"], batch["target"])

    def start(self, further: Iterable[str], device: torch.device) -> None:
        """Counts from zero, with a rate for each of the further loaders."""
        names = list(further)
        if names != list(self.further):  # Lightning knows a metric it has logged by its identity
            self.further = nn.ModuleDict({name: AttackSuccessRate() for name in names}).to(device)
        for _, metric in self.items():
            metric.reset()


class BackdoorModule(LightningModule):
    """A LightningModule that holds a model and knows how it is evaluated and exported.

    It trains nothing. Subclasses add `training_step` and `configure_optimizers`, and set
    `model` in `__init__` or in `setup`. A subclass that overrides one of the hooks below calls
    the inherited one as well.

    Attributes:
        model: The model that is evaluated and exported; None until a subclass sets it.
        can_average: Whether a mean over the weights of several epochs is a model of the method,
            as where one network learns one task with nothing computed in between.
    """

    model: "SplitModel"
    can_average: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.register_module("model", None)
        self.val_scores = Scores()
        self.test_scores = Scores()
        self._counts: dict[Stage, dict[str, int]] = {}

    def configure_model(self) -> None:
        """Refuses what would change the method without a word; called for every command.

        Raises:
            ConfigError: If trainer.precision is bf16-true or 16-true, or a callback trains before
                the method begins, or averages weights that do not belong together.
        """
        if self._trainer is None:  # `load_from_checkpoint`
            return
        refused = _TUNERS if self.can_average else _TUNERS + _AVERAGES
        for callback in vars(self.trainer)["callbacks"]:
            if isinstance(callback, refused):
                raise ConfigError(
                    f"trainer.callbacks: {type(callback).__name__} does not fit "
                    f"{type(self).__name__}: it trains before the method begins, or averages "
                    "networks that do not belong together; leave it out."
                )
        precision = self.trainer.precision
        if precision in ("bf16-true", "16-true"):
            raise ConfigError(
                f"trainer.precision={precision}: images and losses are float32, so "
                "the weights must be as well; take bf16-mixed (or 16-mixed), or 32-true."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets a run that a limit has stopped go on where it was."""
        if "loops" in checkpoint:  # absent where weights alone are saved
            reopen_epoch(self.trainer, checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), float32 in [0, 1], to logits (B, K)."""
        logits: Tensor = self.model(x)
        return logits

    def on_validation_start(self) -> None:
        """Refuses a model that cannot classify, and starts counting from zero."""
        self._begin("val")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one batch of loader 0 (clean) or 1 (triggered)."""
        self._evaluate("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/acc`, and `val/asr` and `val/pa` where there were triggered images."""
        self._finish("val")

    def on_test_start(self) -> None:
        """Refuses a model that cannot classify, and starts counting from zero."""
        self._begin("test")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one batch of loader 0 (clean) or 1 (triggered)."""
        self._evaluate("test", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs `test/acc`, and `test/asr` and `test/pa` where there were triggered images."""
        self._finish("test")

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Computes the features, and the logits where there is a head.

        Returns:
            `index` (B,) as in the batch, `features` (B, D) and, with a head, `logits` (B, K),
            both float32.
        """
        features = self.model.features(batch["image"])
        outputs = {"index": batch["index"], "features": features.float()}
        if self.model.head is not None:
            outputs["logits"] = self.model.head(features).float()
        return outputs

    def evaluation_counts(self, stage: Stage) -> dict[str, int]:
        """Returns how many images the last finished evaluation has seen, on all devices.

        Args:
            stage: `val` or `test`.

        Returns:
            `n_clean` and `n_triggered`, both 0 if there was no such evaluation, and `n_NAME` of
            each further loader.
        """
        return dict(self._counts.get(stage, {"n_clean": 0, "n_triggered": 0}))

    def protocol(self) -> dict[str, Any]:
        """Returns JSON-ready facts for the run record that make numbers comparable.

        Subclasses extend it. `head` is `original`, `probe`, `untrained` or `none`; `labels` tells
        which labels training has read: here none.
        """
        has_head = self.model is not None and self.model.head is not None
        return {"head": "original" if has_head else "none", "labels": "none"}

    @property
    def untested(self) -> str | None:
        """Why the classifier is not to be evaluated as it is, for the user; None if it is."""
        return None

    def export_model(self) -> "SplitModel":
        """Returns the model whose weights are the product of the run."""
        return self.model

    def findings(self) -> Findings | None:
        """What the method says of the samples of the training set; None if it does not judge."""
        return None

    def save_artifacts(self, folder: Path) -> None:
        """Writes what a run has learned beside its model, here nothing; after the data's."""

    def _scores(self, stage: Stage) -> Scores:
        return self.val_scores if stage == "val" else self.test_scores

    def _begin(self, stage: Stage) -> None:
        if self._modules["model"] is None:
            raise ConfigError(
                f"{type(self).__name__} has no model to evaluate: give a weights file with "
                "model.weights, or a checkpoint of one of your runs with --ckpt_path"
            )
        if self.model.head is None:
            raise ConfigError(
                f"{type(self).__name__}: the model has no classifier head, so it gives features "
                "and no classes; train a linear probe on it with -c measure/linear_probe "
                "and model.weights set to this backbone, then evaluate the result"
            )
        if self.untested is not None and self.trainer.state.fn != TrainerFn.FITTING:
            raise ConfigError(self.untested)
        known = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if known is not None and known != self.model.info.num_classes:
            raise ConfigError(
                f"{type(self).__name__}: the classifier has {self.model.info.num_classes} classes "
                f"and the data {known}; give the data set that the model was made for, or train a "
                "linear probe on it with -c measure/linear_probe"
            )
        self._start_counts(stage)

    def _start_counts(self, stage: Stage) -> None:
        self._scores(stage).start(loader_names(self.trainer)[2:], self.device)

    def _evaluate(self, stage: Stage, batch: Batch, dataloader_idx: int) -> None:
        names = loader_names(self.trainer)
        if dataloader_idx >= len(names):
            raise ConfigError(
                f"{stage} loader {dataloader_idx} is one too many; "
                f"evaluation reads at most {len(names)}: {', '.join(names)}"
            )
        self._scores(stage).update(names[dataloader_idx], self(batch["image"]), batch)

    def _finish(self, stage: Stage) -> None:
        """Logs here and not in the step, since a process that got no batch must log as well."""
        counts = {}
        for key, metric in self._scores(stage).items():
            counts[key] = metric.total_count()
            if counts[key] > 0:
                self.log(f"{stage}/{key}", metric, on_epoch=True, add_dataloader_idx=False)
        self._counts[stage] = {"n_clean": counts["acc"], "n_triggered": counts["asr"]}
        self._counts[stage] |= {f"n_{name}": counts[name] for name in self._scores(stage).further}
