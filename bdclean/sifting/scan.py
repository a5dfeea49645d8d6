"""SCAn: find the poisoned class of a labelled data set, and unlearn its odd samples.

Tang, Wang, Tang, Zhang: Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection. USENIX Security 2021. With D the training set and f the features of a
network that was trained on it:

    train      the network on all of D, as anybody would
    analyse    f(x) = mu_class + e; a class whose features are two groups rather than one is
               flagged by the anomaly index of its likelihood ratio, J_k / n_k. In it, the group
               that holds fewer of a few known-clean samples is flagged    (functional/scan.py)
    unlearn    ascent of the cross-entropy on the flagged samples, or
    retrain    a new network on the others

The paper ends with the analysis. The AdvrBD paper adds the ascent and calls it SCAnFT; its rates
are lost. `train`, the steps of `unlearn`, and `retrain` are those of `Sifter`.
docs/methods/scan.md lists every default with its source.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bdclean.backbones.perturber import BatchNormMode
from bdclean.checks import check_choice, check_positive, check_seed
from bdclean.errors import ConfigError, counted
from bdclean.functional.scan import analyse as analyse_features
from bdclean.functional.scan import rank_by_class
from bdclean.modules import Needs, Recipe, Stage, StageOptimizer
from bdclean.modules.reading import gather_rows
from bdclean.sifting.base import Sifter, chosen
from bdclean.types import Batch, ImageFacts, View

Repair = Literal["unlearn", "retrain"]
UNLEARNING = Recipe(epochs=5, lr=5e-4, schedule="constant", augmentation="none")


class SCAn(Sifter):
    """Statistical contamination analyser, with unlearning or a second training.

    Reads a few clean labelled images as well as D: the role `probe`.

    Args:
        facts: Facts of the data.
        recipe: Of the network, and of the new one.
        threshold: A class with a larger anomaly index is flagged.
        components: Analyse so many principal components of the features; None takes them all,
            and then needs more clean images than there are features.
        repair: `unlearn` the flagged samples, or `retrain` a new network on the others.
        unlearn: Passes over the flagged samples.
        unlearn_bn: Batch norm in the ascent: `train` takes the statistics of the batch and updates
            the running ones, `eval` keeps those.
        ascent_cap: A sample is left alone once its cross-entropy exceeds this many ln K; None
            sets no limit.
        feature_batch_size: Per device, while features are computed.
        seed: Of the splits' random starts and of the second initialisation.
        **kwargs: `arch`, `width` and `stem`; see `Sifter`.
    """

    name = "scan"
    needs = Needs(labels=("untrusted", "clean"), images="train")
    further_scores = ("class_index", "margin")
    new_weights = "scan retrain"

    def __init__(
        self,
        facts: ImageFacts,
        recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
        threshold: float = math.e**2,
        components: int | None = None,
        repair: Repair = "unlearn",
        unlearn: Recipe = UNLEARNING,
        unlearn_bn: BatchNormMode = "train",
        ascent_cap: float | None = 2.0,
        feature_batch_size: int = 256,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, recipe, **kwargs)
        self.save_arguments()
        if facts.num_classes < 3:
            raise ConfigError(
                "SCAn compares a class with the median of all, and two classes are equally far "
                "from theirs, so it would never flag one; take another method, such as AdvrBD."
            )
        self.threshold = check_positive("threshold", threshold)
        self.components = components
        if components is not None:
            check_positive("components", components)
        self.repair: Repair = check_choice("repair", repair, Repair)
        self.unlearning = unlearn
        self.unlearn_bn: BatchNormMode = check_choice("unlearn_bn", unlearn_bn, BatchNormMode)
        self.cap = self.cap_of(ascent_cap)
        self.feature_batch_size = check_positive("feature_batch_size", feature_batch_size)
        self.seed = check_seed("seed", seed)

    def plan(self) -> tuple[Stage, ...]:
        """Train, analyse, one of the two repairs, and new names."""
        repairs: dict[Repair, Stage] = {
            "unlearn": Stage(
                "unlearn",
                self.unlearning,
                reads=self.flagged,
                step=self.ascend_flagged,
                optimizer=self.ascent_optimizer,
            ),
            "retrain": Stage(
                "retrain", self.recipe, begin=self.leave_flagged_out, reads=self.unflagged
            ),
        }
        return (
            Stage(
                "train",
                self.recipe,
                begin=self.look_at_clean,
                reads=self.everything,
                step=self.fit_labels,
            ),
            Stage("analyse", begin=self.analyse),
            repairs[self.repair],
            Stage("propose", begin=self.propose),
        )

    # ------------------------------------------------------------------ train

    def look_at_clean(self) -> None:
        """Looks at the clean images now, and not when the network is trained.

        Raises:
            ConfigError: If there are too few of them.
        """
        labels = torch.cat([batch["label"] for batch in self.read(self.clean_view())])
        counts = torch.bincount(labels, minlength=self.num_classes)
        if counts.min() < 2:
            raise ConfigError(
                f"Class {int(counts.argmin())} has {counted(int(counts.min()), 'clean image')}; "
                "SCAn needs 2 or more of every class. Set --data.splits.probe to at least "
                f"{2 * self.num_classes}, better to several hundred."
            )
        dimensions = self.model.num_features
        if self.components is not None and self.components > dimensions:
            raise ConfigError(
                f"components={self.components}: the features have {dimensions} dimensions; it "
                "must be at most that, or null."
            )
        dimensions = self.components or dimensions
        if len(labels) - self.num_classes < dimensions:
            rank_zero_warn(
                f"SCAn estimates a covariance in {dimensions} dimensions from {len(labels)} clean "
                "images, which are too few: raise --data.splits.probe, or lower "
                "--model.components."
            )

    # ------------------------------------------------------------------ analyse

    def clean_view(self) -> View:
        """The few clean labelled images."""
        return View("probe", batch_size=self.feature_batch_size, labels=True)

    def analyse(self) -> None:
        """Flags groups of samples in suspicious classes."""
        self.store("backdoored")
        self.model.eval()
        size = self.feature_batch_size
        features = self.of_each(self._features, labels=False, batch_size=size)
        labels = self.labels_of_each()
        clean = [(self._features(b), b["label"]) for b in self.read(self.clean_view())]
        clean_features, clean_labels = (torch.cat(part).cpu() for part in zip(*clean, strict=True))
        self.model.train()
        found = analyse_features(
            features,
            labels,
            clean_features,
            clean_labels,
            self.num_classes,
            self.seed,
            self.components,
        )
        flagged = found.minor & (found.index > self.threshold)[labels]
        results = {
            "score": rank_by_class(found.index, found.margin, labels),
            "flagged": flagged.long(),
            "class_index": found.index[labels].float(),
            "margin": found.margin.float(),
            "index_of_class": found.index,
        }
        self.results |= {name: self._of_first(value) for name, value in results.items()}
        self.results["flagged"] = self.results["flagged"].bool()
        self.log("analyse/flagged", self.results["flagged"].float().mean())

    def _features(self, batch: Batch) -> Tensor:
        """Penultimate features (B, d), float32; the model in evaluation mode."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.model.features(batch["image"]).float()

    def _of_first(self, values: Tensor) -> Tensor:
        """The first device's; rounding on another one must not move a sample to other batches."""
        table = values if self.global_rank == 0 else torch.zeros_like(values)
        index = torch.arange(len(values), device=self.device)
        return gather_rows(table.to(self.device), index, len(values)).cpu()

    # ------------------------------------------------------------------ repair

    @property
    def _nothing_flagged(self) -> bool:
        return not bool(self.results["flagged"].any())

    def flagged(self) -> View:
        """What is flagged; where nothing is, one batch of D that is not learned from."""
        flagged = self.results["flagged"]
        if self._nothing_flagged:
            flagged = torch.arange(len(flagged)) < self.recipe.batch_size
        return self.labelled(chosen(flagged, "flagged"), self.unlearning)

    def ascend_flagged(self, batch: Batch) -> Tensor:
        """Sets the mode of batch norm first; nothing is learned where nothing is flagged."""
        if self._nothing_flagged or self.unlearn_bn == "eval":
            self.model.eval()
        else:
            self.model.train()
        return self.ascend(batch)

    def ascent_optimizer(self) -> StageOptimizer:
        """SGD; where nothing is flagged, with a rate of 0, which leaves every weight alone."""
        recipe = self.unlearning
        recipe = replace(recipe, lr=0.0) if self._nothing_flagged else recipe
        return self.sgd(recipe, self.model.parameters())

    def details(self) -> dict[str, Any]:
        """Adds the repair, and which classes are flagged."""
        facts = super().details() | {"repair": self.repair}
        if "index_of_class" in self.results:
            index = self.results["index_of_class"]
            facts["flagged_classes"] = (index > self.threshold).nonzero().flatten().tolist()
            facts["anomaly_index"] = [round(value, 3) for value in index.tolist()]
        return facts
