"""Anti-backdoor learning (ABL).

Li, Lyu, Koren, Lyu, Li, Ma: Anti-Backdoor Learning: Training Clean Models on Poisoned Data.
NeurIPS 2021; the authors' code is github.com/bboylyg/ABL. With l the cross-entropy:

    isolate: min E[sign(l - gamma) l]  (LGA)   or   min |E[l] - b| + b  (flooding)
    rank:    D_p = the floor(p N) samples with the lowest l
    retrain: min E l over D without D_p
    unlearn: max E l over D_p

The steps of the last two are those of `Sifter`.
docs/methods/abl.md lists every default with its source.
"""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from bdclean.checks import check_choice, check_not_negative, check_seed
from bdclean.errors import ConfigError
from bdclean.functional.isolation import flooding, local_gradient_ascent
from bdclean.functional.ranking import lowest
from bdclean.modules import Recipe, Stage
from bdclean.modules.reading import of_all_devices
from bdclean.sifting.base import Sifter, chosen
from bdclean.types import Batch, ImageFacts, View

Ascent = Literal["lga", "flooding"]
LevelOf = Literal["sample", "batch"]

ISOLATION = Recipe(epochs=20, schedule="constant")
RETRAINING = Recipe(epochs=70, schedule="multistep", milestones=(30 / 70, 55 / 70))
UNLEARNING = Recipe(epochs=5, lr=5e-4, schedule="constant")


class ABL(Sifter):
    """Isolates what is learned first, trains on the rest, and unlearns what was isolated.

    Defaults are those of BackdoorBox (THUYimingLi/BackdoorBox).

    Args:
        facts: Facts of the data.
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
        **kwargs: `arch`, `width` and `stem`; see `Sifter`.

    Raises:
        ConfigError: If a value is out of its range.
    """

    name = "abl"
    new_weights = "abl/retrain"

    def __init__(
        self,
        facts: ImageFacts,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, recipe, **kwargs)
        self.save_arguments()
        self.isolation, self.unlearning = isolation, unlearning
        self.ascent: Ascent = check_choice("ascent", ascent, Ascent)
        self.level_of: LevelOf = check_choice("level_of", level_of, LevelOf)
        self.level = check_not_negative("level", level)
        if not 0 < isolated < 1:
            raise ConfigError(f"isolated={isolated}: it must lie between 0 and 1.")
        self.isolated = isolated
        self.fresh_start, self.seed = fresh_start, check_seed("seed", seed)
        self.cap = self.cap_of(ascent_cap)

    @property
    def shares(self) -> dict[str, float]:
        """The isolated share."""
        return {"isolated": self.isolated}

    def plan(self) -> tuple[Stage, ...]:
        """Isolate, rank, train on the rest, unlearn."""
        start = self.leave_flagged_out if self.fresh_start else self.warn_of_lost_classes
        return (
            Stage("isolate", self.isolation, reads=self.all_samples, step=self.isolate),
            Stage("rank", begin=self.rank),
            Stage("retrain", self.recipe, begin=start, reads=self.unflagged),
            Stage("unlearn", self.unlearning, reads=self.isolated_samples, step=self.ascend),
            Stage("propose", begin=self.propose),
        )

    def all_samples(self) -> View:
        """What the isolation reads."""
        return self.labelled(recipe=self.isolation)

    def isolate(self, batch: Batch) -> Tensor:
        """The cross-entropy, held at its level."""
        logits = self.model(batch["image"]).float()
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        hold = local_gradient_ascent if self.ascent == "lga" else flooding
        each = losses if self.level_of == "sample" else of_all_devices(self, losses).mean()
        loss = hold(each, self.level).mean()
        self.log_terms(isolate_loss=loss, isolate_ce=losses.mean())
        return loss

    def rank(self) -> None:
        """Scores all samples; those with the lowest loss are considered poisoned."""
        losses = self.loss_of_each(self.logits_of_each(exact=True), self.labels_of_each())
        self.results["score"] = -losses.float()
        self.results["flagged"] = lowest(losses, self.isolated)

    def isolated_samples(self) -> View:
        """What the unlearning reads."""
        return self.labelled(chosen(self.results["flagged"], "isolated"), self.unlearning)
