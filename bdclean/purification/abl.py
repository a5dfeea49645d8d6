"""Anti-backdoor learning (ABL).

Li, Lyu, Koren, Lyu, Li, Ma: Anti-Backdoor Learning: Training Clean Models on Poisoned Data.
NeurIPS 2021; the authors' code is github.com/bboylyg/ABL. With l the cross-entropy:

    isolate: min E[sign(l - gamma) l]  (LGA)   or   min |E[l] - b| + b  (flooding)
    rank:    D_p = the floor(p N) samples with the lowest l
    retrain: min E l over D without D_p
    unlearn: max E l over D_p

The steps of the last two are those of `DatasetDefense`.
docs/methods/abl.md lists every default with its source.
"""

import math
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.split import Stem
from bdclean.errors import ConfigError, check_not_negative, check_positive
from bdclean.functional.isolation import flooding, local_gradient_ascent
from bdclean.functional.ranking import lowest
from bdclean.purification.base import check_choice
from bdclean.purification.dataset import DatasetDefense, chosen
from bdclean.purification.recipe import Recipe
from bdclean.purification.staged import Stage, StageOptimizer
from bdclean.types import Batch, View

Ascent = Literal["lga", "flooding"]
LevelOf = Literal["sample", "batch"]

ISOLATION = Recipe(epochs=20, schedule="constant")
RETRAINING = Recipe(epochs=70, schedule="multistep", milestones=(30 / 70, 55 / 70))
UNLEARNING = Recipe(epochs=5, lr=5e-4, schedule="constant")


class ABL(DatasetDefense):
    """Isolates what is learned first, trains on the rest, and unlearns what was isolated.

    Defaults are those of BackdoorBox (THUYimingLi/BackdoorBox).

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Per channel; comes from the data module.
        std: Per channel; comes from the data module.
        arch: See `bdclean.backbones.build`.
        width: Channels of the first stage of our ResNets.
        stem: `auto` takes the CIFAR stem up to 64 pixels.
        isolation: Training that holds the loss at its level.
        ascent: `lga` (local gradient ascent) or `flooding`.
        level: gamma of LGA, b of flooding; 0 is ordinary training under LGA.
        level_of: Whether the loss of each `sample` or the mean of the `batch` is held at the level.
        isolated: p, the part of the data set that is isolated.
        recipe: Training on the rest.
        fresh_start: Whether that starts from new weights instead of those of the isolation.
        unlearning: Gradient ascent on what was isolated.
        ascent_cap: Samples whose cross-entropy is above this many times ln K are left alone by the
            ascent; None sets no limit.
        seed: Of new weights; see `fresh_start`.

    Raises:
        ConfigError: If a value is out of its range.
    """

    new_weights = "abl/retrain"

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arch: str = "resnet18",
        width: int = 64,
        stem: Stem = "auto",
        isolation: Recipe = ISOLATION,
        ascent: Ascent = "lga",
        level: float = 0.5,
        level_of: LevelOf = "sample",
        isolated: float = 0.01,
        recipe: Recipe = RETRAINING,
        fresh_start: bool = False,
        unlearning: Recipe = UNLEARNING,
        ascent_cap: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, input_size, mean, std, arch, width, stem, recipe)
        # Checkpoints hold plain values, so that they load without unpickling.
        self.save_hyperparameters(ignore=["isolation", "recipe", "unlearning"])
        self.isolation, self.unlearning = isolation, unlearning
        self.ascent: Ascent = check_choice("ascent", ascent, Ascent)
        self.level_of: LevelOf = check_choice("level_of", level_of, LevelOf)
        self.level = check_not_negative("level", level)
        if not 0 < isolated < 1:
            raise ConfigError(f"isolated={isolated}: it must lie between 0 and 1.")
        self.isolated = isolated
        self.fresh_start, self.seed = fresh_start, seed
        if ascent_cap is not None:
            self.cap = check_positive("ascent_cap", ascent_cap) * math.log(num_classes)

    @property
    def parts(self) -> dict[str, float]:
        """The isolated part."""
        return {"isolated": self.isolated}

    def plan(self) -> tuple[Stage, ...]:
        """Isolate, rank, train on the rest, unlearn."""
        return (
            Stage("isolate", self.isolation.epochs),
            Stage("rank", 0),
            Stage("retrain", self.recipe.epochs),
            Stage("unlearn", self.unlearning.epochs),
            Stage("propose", 0),
        )

    # ------------------------------------------------------------------ isolation

    def isolate_view(self) -> View:
        """All samples."""
        return self.labelled(None, self.isolation)

    def isolate_step(self, batch: Batch) -> Tensor:
        """The cross-entropy, held at its level."""
        logits = self.model(batch["image"]).float()
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        hold = local_gradient_ascent if self.ascent == "lga" else flooding
        each = losses if self.level_of == "sample" else losses.mean()
        loss = hold(each, self.level).mean()
        self.log_terms(isolate_loss=loss, isolate_ce=losses.mean())
        return loss

    def isolate_optimizer(self) -> StageOptimizer:
        """SGD."""
        return self.sgd(self.isolation)

    def begin_rank(self) -> None:
        """Scores all samples; those with the lowest loss are held to be poisoned."""
        losses = self.loss_of_each(self.logits_of_each(exact=True), self.labels_of_each())
        self.results["score"] = -losses.float()
        self.results["flagged"] = lowest(losses, self.isolated)

    # ------------------------------------------------------------------ retraining, unlearning

    def begin_retrain(self) -> None:
        """Goes on with the weights of the isolation, unless told otherwise."""
        if self.fresh_start:
            super().begin_retrain()
        else:
            self.tell_of_lost_classes()

    def unlearn_view(self) -> View:
        """The isolated samples."""
        return self.labelled(chosen(self.results["flagged"], "isolated"), self.unlearning)

    def unlearn_optimizer(self) -> StageOptimizer:
        """SGD."""
        return self.sgd(self.unlearning)

    def protocol(self) -> dict[str, Any]:
        """Adds the method."""
        return super().protocol() | {"method": "abl"}
