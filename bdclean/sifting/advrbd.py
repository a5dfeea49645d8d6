r"""AdvrBD: find the poisoned samples of a labelled data set, and train without them.

A poisoned sample is recognised by its trigger, wherever else the image is disturbed, so its
prediction changes less under an adversarial patch. With D the training set, y~ its labels:

    train      f on all of D
    partition  s_i = KL(P(x_i) || P(clip(x_i + m_i * delta_i))), delta_i the worst one in the ball;
               the largest s_i, later of each label, join D_c, considered clean       (algorithm 1)
    relearn    a pass of descent on CE(D \ D_c)
    unlearn    a pass of ascent on CE(D_c); in rounds, f keeps the backdoor  (algorithm 2)
    enhance    D_c := what most rounds forgot; from the first f, w CE(D \ D_c) - CE(D_c) (eq. 4)
    identify   flagged = {i : P(y~_i | x_i) > c}
    retrain    a new network on the samples that are not flagged
    relabel    the new network names the flagged samples, and goes on with all (finetune)
The formulas are reconstructed; docs/methods/advrbd.md says what is stated.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.checks import (
    check_choice,
    check_not_negative,
    check_positive,
    check_seed,
    check_share,
)
from bdclean.functional.consistency import PatchScore
from bdclean.functional.ranking import fewest_rounds, highest_of_each
from bdclean.functional.seeds import derive_seed
from bdclean.functional.unlearning import descent_and_ascent
from bdclean.modules import Recipe, Stage
from bdclean.sifting.base import Sifter, chosen, drawn
from bdclean.sifting.rounds import Rounds
from bdclean.types import AugmentationName, Batch, ImageFacts, Subset, View

RELEARNING = Recipe(epochs=1, lr=0.01, schedule="constant", augmentation="none")
UNLEARNING = replace(RELEARNING, lr=0.03, momentum=0.0, weight_decay=0.0)
ENHANCEMENT = replace(UNLEARNING, batch_size=256)
FINETUNING = Recipe(epochs=10, lr=0.01)
Until = Literal["score", "identify", "retrain", "relabel"]


class AdvrBD(Sifter):
    """Adversarial-robustness-based backdoor defence of a labelled training set.

    Args:
        facts: Facts of the data.
        recipe: Of the first network and of the new one.
        first_augmentation: Of the first network; None takes that of `recipe`.
        first_epochs: Of the first network; None takes those of `recipe`.
        patch: How samples are scored.
        scoring_batch_size: Per device, while scoring.
        rounds: How D_c, the samples that count as clean, grows.
        relearn: Descent on the rest in each round.
        unlearn: Ascent on D_c in each round, after `relearn`.
        ascent_cap: Cross-entropy in ln K above which a sample is left alone; None: no limit.
        enhance: Of the last network, from the first one on; half of a batch is from D_c.
        enhance_steps: Its steps.
        rest_weight: w, of the descent on the rest in these steps.
        confidence: c, the probability of its label above which a sample is flagged.
        until: The last step: `score`, `identify`, `retrain` (main tables of the paper), `relabel`.
        finetune: Of the last stage.
        seed: Of the patches and of the second initialisation.
        **kwargs: `arch`, `width` and `stem`; see `Sifter`.

    Raises:
        ConfigError: If a value is out of its range.
    """

    name = "advrbd"
    further_scores = ("consistency",)
    new_weights = "advrbd retrain"

    def __init__(
        self,
        facts: ImageFacts,
        recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
        first_augmentation: AugmentationName | None = "none",
        first_epochs: int | None = None,
        patch: PatchScore = PatchScore(),  # noqa: B008  (frozen)
        scoring_batch_size: int = 256,
        rounds: Rounds = Rounds(),  # noqa: B008  (frozen)
        relearn: Recipe = RELEARNING,
        unlearn: Recipe = UNLEARNING,
        ascent_cap: float | None = 1.0,
        enhance: Recipe = ENHANCEMENT,
        enhance_steps: int = 64,
        rest_weight: float = 0.3,
        confidence: float = 0.9,
        until: Until = "relabel",
        finetune: Recipe = FINETUNING,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, recipe, **kwargs)
        self.save_arguments()
        augmentation = first_augmentation or recipe.augmentation
        epochs = recipe.epochs if first_epochs is None else first_epochs
        epochs = check_positive("first_epochs", epochs)
        self.first = replace(recipe, augmentation=augmentation, epochs=epochs)
        self.patch, self.rounds = patch, rounds
        self.scoring_batch_size = check_positive("scoring_batch_size", scoring_batch_size)
        self.relearning, self.unlearning, self.enhancement = relearn, unlearn, enhance
        self.cap = self.cap_of(ascent_cap)
        self.enhance_steps = check_positive("enhance_steps", enhance_steps)
        self.rest_weight = check_not_negative("rest_weight", rest_weight)
        self.confidence = check_share("confidence", confidence)
        self.until: Until = check_choice("until", until, Until)
        self.finetuning, self.seed = finetune, check_seed("seed", seed)

    @property
    def shares(self) -> dict[str, float]:
        """What joins D_c in a round."""
        share = self.rounds.partition_rate
        return {} if self.until == "score" else {"rounds.partition_rate": share}

    def plan(self) -> tuple[Stage, ...]:
        """Train, rounds of forgetting, enhance, identify, retrain, relabel."""
        train = partial(self.labelled, recipe=self.first)
        one_round = (
            Stage("partition", begin=self.partition),
            Stage("relearn", self.relearning, reads=self.rest),
            Stage("unlearn", self.unlearning, reads=self.clean_part, step=self.ascend),
        )
        parts: dict[Until, tuple[Stage, ...]] = {
            "score": (
                Stage("train", self.first, reads=train, step=self.fit_labels),
                Stage("score", begin=self.score),
            ),
            "identify": (
                *one_round * self.rounds.count,
                Stage(
                    "enhance",
                    self.enhancement,
                    begin=self.start_enhancing,
                    reads=self.both_halves,
                    step=self.enhance,
                ),
                Stage("identify", begin=self.identify),
            ),
            "retrain": (
                Stage("retrain", self.recipe, begin=self.leave_flagged_out, reads=self.unflagged),
                Stage("propose", begin=self.propose),
            ),
            "relabel": (
                Stage("relabel", begin=self.relabel),
                Stage("finetune", self.finetuning, reads=self.relabelled),
            ),
        }
        wanted = list(parts)[: list(parts).index(self.until) + 1]
        return tuple(stage for name in wanted for stage in parts[name])

    # ------------------------------------------------------------------ algorithm 1

    def score(self) -> None:
        """The first scores; nothing is judged yet, and nothing in D_c."""
        self.store("suspect")
        s = self.results["least"] = self.inconsistency(None)
        self.results["consistency"] = self.results["score"] = -s
        self.results["clean_part"] = torch.zeros(len(s), dtype=torch.bool)

    def partition(self) -> None:
        """Adds the largest scores to D_c; a score is the least of all rounds so far.

        First of all samples: D_c lacks the target class then, and f comes to name it everywhere.
        Then of each label, until its share is in D_c. What the first f has not learned comes last.
        """
        labels, clean, p = self._look(), self.results["clean_part"], self.rounds.partition_rate
        known, s = self.results["rounds"][0], self.results["least"]
        labels = labels * (self.round >= self.rounds.of_all)
        last, share = (
            min(n * p, self.rounds.max_clean_fraction) for n in (self.round, self.round + 1)
        )
        # Only the largest so far are scored again; no other sample may join.
        nearest = min(last + self.rounds.candidates * p, 1.0)
        near = highest_of_each(s.where(known, -math.inf), labels, clean, nearest) & ~clean
        if share > last and near.any():
            new = self.inconsistency(Subset(near.nonzero().flatten()))
            s = torch.minimum(s, new.where(near, math.inf))
            self.results["least"], rank = s, s.where(known & near, -math.inf)
            self.results["clean_part"] = highest_of_each(rank, labels, clean, share)

    def inconsistency(self, subset: Subset | None) -> Tensor:
        """s_i of the samples of `subset`, or of all, (N,), in nats; labels are not read."""
        self.model.eval()
        autocast = self.trainer.precision_plugin.forward_context()
        with autocast, perturb_precision(self.device.type) as dtype:
            score = partial(self._score, Perturber(self.model, "eval", dtype))
            s = self.of_each(score, labels=False, batch_size=self.scoring_batch_size, subset=subset)
        self.model.train()
        return s

    def _score(self, copy: Perturber, batch: Batch) -> Tensor:
        x, head = batch["image"], self.model.require_head()
        place = derive_seed("patches", self.seed, self.round, int(batch["index"][0]))
        draw = torch.Generator(x.device).manual_seed(place)
        score, exact = self.patch, self.exact_logits
        return score(x, lambda z: head(copy.features(z).to(self.dtype)), exact, draw)

    # ------------------------------------------------------------------ algorithm 2, equation 4

    def rest(self) -> View:
        """D without D_c."""
        rest = chosen(~self.results["clean_part"], "left, besides those considered clean")
        return self.labelled(rest, self.relearning)

    def clean_part(self) -> View:
        """D_c, several times over where it is small: a few steps would not make f forget."""
        rows = chosen(self.results["clean_part"], "considered clean").rows
        times = math.ceil(self.rounds.ascent_steps * self.per_step(self.unlearning) / len(rows))
        return self.labelled(Subset(rows.repeat(times)), self.unlearning)

    def start_enhancing(self) -> None:
        """D_c is now what most rounds have forgotten; the first network starts again."""
        labels, a, share = self._look(), self.rounds.agreement, self.rounds.label_share
        rounds, s = self.results["rounds"][1:], self.results["least"]
        self.results["forgotten"] = fewest_rounds(rounds, s, labels, a, share)
        self.restore("suspect")

    def both_halves(self) -> View:
        """As many samples of D_c as of the rest, for `enhance_steps` steps."""
        clean, seed = self.results["forgotten"], derive_seed("enhance", self.seed)
        parts = chosen(clean, "forgotten by most rounds"), chosen(~clean, "known to most rounds")
        size = self.enhance_steps * self.per_step(self.enhancement) // 2
        rows = torch.cat([drawn(part.rows, size, seed) for part in parts])
        return self.labelled(Subset(rows), self.enhancement)

    def enhance(self, batch: Batch) -> Tensor:
        """Descent on the rest, ascent on D_c as far as the cap."""
        clean = self.results["forgotten"].to(self.device)[batch["index"]]
        logits, w = self.model(batch["image"]), self.rest_weight
        loss = descent_and_ascent(logits, batch["label"], clean, w, self.cap)
        self.log_terms(enhance_loss=loss)
        return loss

    def identify(self) -> None:
        """Flags the samples of whose label the enhanced network is sure."""
        loss = self.loss_of_each(self.logits_of_each(exact=True), self.labels_of_each())
        self.results["score"] = -loss.float()
        self.results["flagged"] = (-loss).exp() > self.confidence
        self.close_round(self.results["flagged"])
        self.store("enhanced")

    def _look(self) -> Tensor:
        """Logs what the present network forgot, keeps what it names; gives labels (N,)."""
        logits, labels = self.logits_of_each(exact=True), self.labels_of_each()
        loss = self.loss_of_each(logits, labels)
        self.close_round(logits.argmax(1) == labels)
        self.log("round/flagged", self.results["rounds"][-1].float().mean())
        clean = self.results["clean_part"]
        self.log("round/clean_part", clean.float().mean())
        for name, part in ("rest", ~clean), ("clean_part", clean):
            if part.any():
                self.log(f"round/loss_{name}", loss[part].mean())
        return labels

    def relabel(self) -> None:
        """The flagged samples get the labels that the new network has proposed."""
        self.store("before_relabelling")
        named, labels = self.results["proposed"], self.labels_of_each()
        self.results["labels"] = torch.where(self.results["flagged"], named, labels)

    def relabelled(self) -> View:
        """All of D with the labels as they are now."""
        labels = self.results["labels"]
        return self.labelled(Subset(torch.arange(len(labels)), labels), self.finetuning)

    def details(self) -> dict[str, Any]:
        """Adds where the method ends."""
        return super().details() | {"until": self.until}
