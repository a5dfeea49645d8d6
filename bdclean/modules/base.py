"""What every LightningModule of the package stands on: networks, evaluation, record.

Two loaders are evaluated, in this order: `clean` (images with their labels) and `triggered` (the
same kind of images with the trigger, their true labels, and the labels that the attacker wants).
Logged are `<split>/acc` over the first, `<split>/asr` and `<split>/pa` over the second, in
percent, and `<split>/asr_floor`, the ASR of the second's images without their trigger; the split is
`val` or `test`. Further loaders of an attack (`further_tests` of the data module) log
`<split>/<name>`, the share of their images answered with the label counted there.
Nothing but integer counts is kept between batches.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn

from bdclean.backbones import SplitModel
from bdclean.backbones.head import ProbeHead
from bdclean.errors import ConfigError
from bdclean.metrics.scores import Scores
from bdclean.modules.arguments import keep_arguments, plain
from bdclean.modules.checkpoints import (
    RECORD,
    check_complete,
    named_checkpoint,
    record_of,
    telling_damage,
)
from bdclean.modules.finite import StaysFinite, check_outputs
from bdclean.modules.needs import Needs
from bdclean.modules.reading import data_of, loader_names, read, viewable_data
from bdclean.modules.restored import check_state, networks_of
from bdclean.modules.trainer import check_callbacks, check_limits, check_precision, is_fitting
from bdclean.types import Batch, Findings, View

Split = Literal["val", "test"]
Classifier = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W), float32 in [0, 1], to logits (B, K)."""

NO_HEAD = (
    "the model has no classifier head, so it gives features and no classes; train a linear probe "
    "on it with `-c measure/linear_probe` and --model.weights set to this backbone, then evaluate "
    "the result."
)


class BackdoorModule(LightningModule):
    """A LightningModule that holds a model and knows how it is evaluated and exported.

    It trains nothing. Subclasses add `training_step` and `configure_optimizers`, and `install`
    the model in `__init__` or in `setup`. The hooks of Lightning that stand here are final in
    meaning: a subclass that overrides one calls the inherited one as well. It may replace
    `begin_evaluation`, `shown`, `details`, `kept`, `restore_kept`, `untested`, `findings` and
    `save_artifacts`, which do nothing here.

    Attributes:
        name: Of the method, in records.
        needs: What the method reads and must have.
        model: The model that is evaluated and exported; None until a subclass installs it.
        probes: Whether the method ends with a linear probe, which reads clean labels.
        classifiers: Prefixes of what is measured side by side; one without a name is usual.
        can_average: Whether a mean over the weights of several epochs is a model of the method,
            as where one network learns one task with nothing computed in between.
    """

    model: SplitModel
    name: ClassVar[str] = "unnamed"
    needs: ClassVar[Needs] = Needs()
    probes: bool = False
    classifiers: ClassVar[tuple[str, ...]] = ("",)
    can_average: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.register_module("model", None)
        self.scores = nn.ModuleDict(
            {f"{split}{name}": Scores() for split in ("val", "test") for name in self.classifiers}
        )
        self._classifiers: dict[str, Classifier] = {}
        self._counts: dict[Split, dict[str, int]] = {}
        self._intervals: dict[Split, dict[str, tuple[float, float]]] = {}

    def save_arguments(self, *ignore: str) -> None:
        """Keeps the arguments of the calling `__init__` in checkpoints, as plain values.

        Groups become dictionaries, so that a checkpoint loads without unpickling;
        `load_from_checkpoint` makes groups of them again. `ignore` names those that no file holds.
        """
        keep_arguments(self, sys._getframe(1), ignore)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's; an argument that is changed may be a group as well as a dictionary."""
        loaded: Self = super().load_from_checkpoint(checkpoint_path, *args, **plain(kwargs))
        return loaded

    # ------------------------------------------------------------------ networks

    def install(self, **networks: SplitModel | None) -> None:
        """Makes networks the module's own, in place of earlier ones of these names."""
        for name, network in networks.items():
            if network is not None:
                network.to(memory_format=torch.channels_last)
            self.register_module(name, network)

    def has_model(self) -> bool:
        """Whether there is a model already."""
        return self._modules["model"] is not None

    def require_model(self) -> SplitModel:
        """The model.

        Raises:
            ConfigError: If neither weights nor a checkpoint were given.
        """
        if not self.has_model():
            raise ConfigError(
                f"{type(self).__name__} has no model: give a checkpoint of one of your runs with "
                "--ckpt_path, or a weights file with --model.weights, where a method takes one."
            )
        return self.model

    def product(self) -> SplitModel:
        """The model whose weights are the product of the run."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), float32 in [0, 1], to logits (B, K)."""
        logits: Tensor = self.model(x)
        return logits

    # ------------------------------------------------------------------ checkpoints

    def configure_model(self) -> None:
        """Refuses what would change the method without a word; called for every command.

        Raises:
            ConfigError: If trainer.precision is bf16-true or 16-true, or a limit of the Trainer is
                0.
        """
        if self._trainer is not None:  # None in `load_from_checkpoint`
            check_precision(self.trainer)
            check_limits(self.trainer)

    def configure_callbacks(self) -> list[Callback]:
        """What watches a fit; refuses what does not fit the method, before it is set up.

        Raises:
            ConfigError: If a callback trains before the method begins, averages weights that do
                not belong together, or chooses which weights are trained.
        """
        check_callbacks(self.trainer, self, can_average=self.can_average)
        return [StaysFinite()] if is_fitting(self.trainer) else []

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what describes the networks, and what the method keeps; one entry of ours."""
        networks = {n: net for n, net in self.named_children() if isinstance(net, SplitModel)}
        checkpoint[RECORD] = {
            "method": self.name,
            "networks": {name: net.info.to_metadata() for name, net in networks.items()},
            **self.kept(),
        }

    @final
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the networks whose weights are restored next.

        Raises:
            ConfigError: If the checkpoint is of another method or of an earlier version, or lacks
                a part.
        """
        file = named_checkpoint(self._trainer)
        record = record_of(checkpoint, self.name, file)
        fits = self._trainer is not None and is_fitting(self._trainer)
        check_complete(checkpoint, file, goes_on=fits)
        with telling_damage(file):
            self.install(**networks_of(record, checkpoint["state_dict"]))
            self.restore_kept(record)

    def on_fit_start(self) -> None:
        """Refuses to go on from loops, optimizers or schedulers that are not those of the fit."""
        check_state(self.trainer, named_checkpoint(self.trainer))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module.

        Raises:
            ConfigError: If the weights do not fit the networks.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            first = [line.strip() for line in str(error).splitlines()[1:2]]
            raise ConfigError(
                f"{named_checkpoint(self._trainer)}: the weights do not fit the networks of the "
                f"run ({' '.join(first)}); the checkpoint is damaged, or of other settings."
            ) from error

    def kept(self) -> dict[str, Any]:
        """What the method keeps in checkpoints as well as weights; plain values and tensors."""
        return {}

    def restore_kept(self, record: dict[str, Any]) -> None:
        """Takes back what `kept` gave, before weights are restored."""

    # ------------------------------------------------------------------ data and logs

    def request(self, view: View) -> None:
        """Makes the next training loader serve `view`."""
        viewable_data(self.trainer).set_view(self.declared(view))

    def read(self, view: View, *, shared: bool = False) -> Iterator[Batch]:
        """All rows of `view`, un-augmented, on the device and in the same order on every rank.

        Where they are `shared`, a rank gets its part of the batches only.
        """
        return read(self.trainer, self.declared(view), self.device, shared=shared)

    def declared(self, view: View) -> View:
        """The view, if `needs` says that the method reads such.

        Raises:
            ConfigError: If it shows more than that.
        """
        self.needs.check(view, type(self).__name__, probes=self.probes)
        return view

    def log_terms(self, **terms: Tensor) -> None:
        """Logs the mean over the epoch of each term, as `train/<name>`."""
        for name, term in terms.items():
            self.log(
                f"train/{name}",
                term.detach(),
                on_step=False,
                on_epoch=True,
                prog_bar=name.endswith("loss"),
                sync_dist=True,
            )

    # ------------------------------------------------------------------ evaluation

    def begin_evaluation(self, split: Split) -> dict[str, Classifier]:
        """What is measured, by the names in `classifiers`; here the model.

        Raises:
            ConfigError: If the model cannot classify, or not the images at hand.
        """
        info = self.require_model().info
        if self.model.head is None:
            raise ConfigError(f"{type(self).__name__}: {NO_HEAD}")
        if self.untested is not None and not is_fitting(self.trainer):
            raise ConfigError(self.untested)
        known = getattr(data_of(self.trainer), "num_classes", None)
        if known is not None and known != info.num_classes:
            raise ConfigError(
                f"{type(self).__name__}: the classifier has {info.num_classes} classes "
                f"and the data {known}; give the data set that the model was made for, or train a "
                "linear probe on it with `-c measure/linear_probe`."
            )
        return {"": self}

    def shown(self, batch: Batch, loader: str) -> Batch:
        """An evaluation batch as the model is to see it."""
        return batch

    @property
    def untested(self) -> str | None:
        """Why the classifier is not to be evaluated as it is, for the user; None if it is."""
        return None

    def on_validation_start(self) -> None:
        """Refuses a model that cannot classify, and starts counting from zero."""
        self._begin("val")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one batch of a loader; see the module."""
        self._count("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/acc`, and `val/asr` and `val/pa` where there were triggered images."""
        self._finish("val")

    def on_test_start(self) -> None:
        """Refuses a model that cannot classify, and starts counting from zero."""
        self._begin("test")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one batch of a loader; see the module."""
        self._count("test", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs `test/acc`, and `test/asr` and `test/pa` where there were triggered images."""
        self._finish("test")

    def on_predict_start(self) -> None:
        """Refuses to predict without a model."""
        self.require_model()

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Computes the features, and the logits where there is a head.

        Returns:
            `index` (B,) as in the batch, `features` (B, D) and, with a head, `logits` (B, K),
            both float32.
        """
        names = dict(enumerate(loader_names(self.trainer)))
        batch = self.shown(batch, names.get(dataloader_idx, ""))
        features = self.model.features(batch["image"])
        outputs = {"index": batch["index"], "features": features.float()}
        if self.model.head is not None:
            outputs["logits"] = self.model.head(features).float()
        return outputs

    def evaluation_counts(self, split: Split) -> dict[str, int]:
        """How many images the last finished evaluation has seen, on all devices.

        These are `n_clean` and `n_triggered`, both 0 without one, and `n_NAME` of further loaders.
        """
        counts = self._counts.get(split, {"clean": 0, "triggered": 0})
        return {f"n_{loader}": count for loader, count in counts.items()}

    def evaluation_intervals(self, split: Split) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each percentage that the last finished evaluation has logged."""
        return self._intervals.get(split, {})

    def _scores(self, split: Split) -> Iterator[tuple[str, Scores]]:
        for name in self.classifiers:
            scores = self.scores[f"{split}{name}"]
            assert isinstance(scores, Scores)  # noqa: S101
            yield name, scores

    def _begin(self, split: Split) -> None:
        self._classifiers = self.begin_evaluation(split)
        for _, scores in self._scores(split):
            scores.start(loader_names(self.trainer)[2:], self.device)

    def _count(self, split: Split, batch: Batch, dataloader_idx: int) -> None:
        names = loader_names(self.trainer)
        if dataloader_idx >= len(names):
            raise ConfigError(
                f"{split} loader {dataloader_idx} is one too many; "
                f"evaluation reads at most {len(names)}: {', '.join(names)}."
            )
        loader = names[dataloader_idx]
        batch = self.shown(batch, loader)
        for name, scores in self._scores(split):
            if name in self._classifiers:
                scores.update(loader, self._classifiers[name](batch["image"]), batch)

    def _finish(self, split: Split) -> None:
        """Logs here and not in the step, since a process that got no batch must log as well."""
        self._intervals[split] = {}
        for name, scores in self._scores(split):
            check_outputs(self.trainer, scores.odd)
            for key, metric in scores.items():
                if metric.total_count() > 0:
                    label = f"{name}_{key}" if name else key
                    value = metric.compute()  # of all processes
                    self.log(f"{split}/{label}", value, add_dataloader_idx=False, sync_dist=True)
                    self._intervals[split][label] = metric.interval()
            self._counts[split] = scores.counts()
        self._classifiers = {}

    # ------------------------------------------------------------------ what a run leaves

    @final
    def protocol(self) -> dict[str, Any]:
        """JSON-ready facts for the run record that make numbers comparable.

        `head` is `original`, `probe`, `untrained`, `none` or `knn`; `labels` tells which labels
        training has read.
        """
        head = "none"
        if self.has_model() and self.model.head is not None:
            head = "probe" if isinstance(self.model.head, ProbeHead) else "original"
            head = head if self.untested is None else "untrained"
        facts = {"method": self.name, "head": head, "labels": self.needs.labels_name}
        return facts | self.details()

    def details(self) -> dict[str, Any]:
        """What a method adds to its protocol."""
        return {}

    def findings(self) -> Findings | None:
        """What the method says of the samples of the training set; None if it does not judge."""
        return None

    def save_artifacts(self, folder: Path) -> None:
        """Writes what a run has learned besides its model; after the data module's files."""
