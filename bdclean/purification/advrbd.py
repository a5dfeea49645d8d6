r"""AdvrBD: find the poisoned samples of a labelled data set, and train without them.

A poisoned sample is recognised by its trigger, wherever else the image is disturbed, so its
prediction changes less under an adversarial patch. With D the training set, y~ its labels:

    train      f on all of D
    partition  s_i = KL(P(x_i) || P(clip(x_i + m_i * delta_i))), delta_i the worst one in the ball;
               the largest s_i, later of each label, join D_c, held clean       (algorithm 1)
    relearn    a pass of descent on CE(D \ D_c)
    unlearn    a pass of ascent on CE(D_c); in rounds, f keeps the backdoor  (algorithm 2)
    enhance    D_c := what most rounds forgot; from the first f, w CE(D \ D_c) - CE(D_c) (eq. 4)
    identify   flagged = {i : P(y~_i | x_i) > c}
    retrain    a new network on the samples that are not flagged
    relabel    the new network names the flagged samples, and goes on with all (finetune)
The formulas are reconstructed; docs/methods/advrbd.md tells what is stated.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.backbones.attacker import Attacker, attack_precision
from bdclean.backbones.split import Stem
from bdclean.errors import check_not_negative, check_positive
from bdclean.functional.consistency import Inner, PatchScore, PatchShape
from bdclean.functional.perturbation import PGD
from bdclean.functional.ranking import fewest_rounds, highest_of_each
from bdclean.functional.seeds import derive_seed
from bdclean.functional.unlearning import descent_and_ascent
from bdclean.purification.base import check_choice, check_share
from bdclean.purification.dataset import DatasetDefense, chosen, drawn
from bdclean.purification.recipe import Recipe
from bdclean.purification.staged import Stage
from bdclean.types import AugmentationName, Batch, Subset, View

RELEARNING = Recipe(epochs=1, lr=0.01, schedule="constant", augmentation="none")
UNLEARNING = replace(RELEARNING, lr=0.03, momentum=0.0, weight_decay=0.0)
ENHANCEMENT = replace(UNLEARNING, batch_size=256)
FINETUNING = Recipe(epochs=10, lr=0.01)
Until = Literal["score", "identify", "retrain", "relabel"]


class AdvrBD(DatasetDefense):
    """Adversarial-robustness-based backdoor defence of a labelled training set.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side H of the images; comes from the data module, as `mean` and `std`.
        mean: Per channel.
        std: Per channel.
        arch: See `bdclean.backbones.build`, as for `width` and `stem`.
        width: Channels of the first stage.
        stem: `auto` takes the CIFAR stem up to 64 pixels.
        recipe: Of the first network and of the new one.
        fitting_augmentation: Of the first network; None takes that of `recipe`.
        fitting_epochs: Of the first network; None takes those of `recipe`.
        patch_shape: `square` or `disc`.
        patch_radius: r in pixels; None takes H / 8.
        epsilon: Radius of the ball, in 8-bit pixel values.
        pgd_steps: Steps of the inner maximisation.
        step_size: As a share of the radius.
        inner: What the inner maximisation maximises; see `adversarial_patch`.
        num_masks: Patches tried for each sample; the score is the least of them.
        partition_rate: p: so much of all samples, or of each label, joins D_c in a round.
        max_clean_fraction: Share of them at which D_c stops growing.
        candidates: Scored anew in each round: so many times p, the largest so far.
        rounds: T.
        rounds_of_all: The first so many take the largest scores of all, the others of each label.
        relearn: Descent on the rest in each round.
        unlearn: Ascent on D_c in each round, after `relearn`.
        ascent_steps: Fewest steps of a round's ascent; a small D_c is repeated.
        ascent_cap: Cross-entropy in ln K above which a sample is left alone; None: no limit.
        agreement: Held clean in the end is what fewer of the rounds than this share still name,
        label_share: and of each label so much at least; see `fewest_rounds`.
        enhance: Of the last network, from the first one on; half of a batch is from D_c.
        enhance_steps: Its steps.
        rest_weight: w, of the descent on the rest in these steps.
        confidence: c, the probability of its label above which a sample is flagged.
        until: The last step: `score`, `identify`, `retrain` (main tables of the paper), `relabel`.
        finetune: Of the last stage.
        scoring_batch_size: Per device, while scoring.
        seed: Of the patches and of the second initialisation.

    Raises:
        ConfigError: If a value is out of its range.
    """

    further_scores = ("consistency",)
    new_weights = "advrbd retrain"

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arch: str = "resnet18",
        width: int = 64,
        stem: Stem = "auto",
        recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
        fitting_augmentation: AugmentationName | None = "none",
        fitting_epochs: int | None = None,
        patch_shape: PatchShape = "square",
        patch_radius: int | None = None,
        epsilon: float = 8.0,
        pgd_steps: int = 10,
        step_size: float = 0.25,
        inner: Inner = "kl",
        num_masks: int = 3,
        partition_rate: float = 0.02,
        max_clean_fraction: float = 0.9,
        candidates: int = 4,
        rounds: int = 8,
        rounds_of_all: int = 3,
        relearn: Recipe = RELEARNING,
        unlearn: Recipe = UNLEARNING,
        ascent_steps: int = 96,
        ascent_cap: float | None = 1.0,
        agreement: float = 0.5,
        label_share: float = 0.3,
        enhance: Recipe = ENHANCEMENT,
        enhance_steps: int = 64,
        rest_weight: float = 0.3,
        confidence: float = 0.9,
        until: Until = "relabel",
        finetune: Recipe = FINETUNING,
        scoring_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, input_size, mean, std, arch, width, stem, recipe)
        # Checkpoints hold plain values, so that they load without unpickling.
        self.save_hyperparameters(ignore=["recipe", "unlearn", "relearn", "enhance", "finetune"])
        radius = input_size // 8 if patch_radius is None else patch_radius
        self.patch_score = PatchScore(
            shape=check_choice("patch_shape", patch_shape, PatchShape),
            radius=check_not_negative("patch_radius", radius),
            pgd=PGD(epsilon, pgd_steps, step_size, "relative", "linf", random_start=True),
            inner=check_choice("inner", inner, Inner),
            num_masks=check_positive("num_masks", num_masks),
        )
        self.partition_rate = check_share("partition_rate", partition_rate)
        self.max_clean_fraction = check_share("max_clean_fraction", max_clean_fraction)
        self.candidates = check_positive("candidates", candidates)
        self.rounds = check_positive("rounds", rounds)
        self.rounds_of_all = check_not_negative("rounds_of_all", rounds_of_all)
        first = fitting_augmentation or recipe.augmentation
        epochs = recipe.epochs if fitting_epochs is None else fitting_epochs
        epochs = check_positive("fitting_epochs", epochs)
        self.fitting = replace(recipe, augmentation=first, epochs=epochs)
        self.relearn, self.unlearn, self.enhance = relearn, unlearn, enhance
        self.ascent_steps = check_positive("ascent_steps", ascent_steps)
        if ascent_cap is not None:
            self.cap = check_positive("ascent_cap", ascent_cap) * math.log(num_classes)
        self.agreement = check_share("agreement", agreement)
        self.label_share = check_share("label_share", label_share)
        self.enhance_steps = check_positive("enhance_steps", enhance_steps)
        self.rest_weight = check_not_negative("rest_weight", rest_weight)
        self.confidence = check_share("confidence", confidence)
        self.until: Until = check_choice("until", until, Until)
        self.scoring_batch_size = check_positive("scoring_batch_size", scoring_batch_size)
        self.finetune, self.seed = finetune, seed

    @property
    def parts(self) -> dict[str, float]:
        """What joins D_c in a round."""
        return {} if self.until == "score" else {"partition_rate": self.partition_rate}

    def plan(self) -> tuple[Stage, ...]:
        """Train, rounds of forgetting, enhance, identify, train anew, relabel."""
        one_round = (Stage("partition", 0), self.stage("relearn"), self.stage("unlearn"))
        parts: dict[Until, tuple[Stage, ...]] = {
            "score": (self.stage("train"), Stage("score", 0)),
            "identify": (*one_round * self.rounds, self.stage("enhance"), Stage("identify", 0)),
            "retrain": (self.stage("retrain"), Stage("propose", 0)),
            "relabel": (Stage("relabel", 0), self.stage("finetune")),
        }
        wanted = list(parts)[: list(parts).index(self.until) + 1]
        return tuple(stage for name in wanted for stage in parts[name])

    # ------------------------------------------------------------------ algorithm 1

    def begin_score(self) -> None:
        """The first scores; nothing is judged yet, and nothing in D_c."""
        self.keep("suspect")
        s = self.results["least"] = self.inconsistency(None)
        self.results["consistency"] = self.results["score"] = -s
        self.results["clean_part"] = torch.zeros(len(s), dtype=torch.bool)

    def begin_partition(self) -> None:
        """Adds the largest scores to D_c; a score is the least of all rounds so far.

        First of all samples: D_c lacks the target class then, and f comes to name it everywhere.
        Then of each label, until its share is in D_c. What the first f has not learned comes last.
        """
        labels, clean, p = self._look(), self.results["clean_part"], self.partition_rate
        known, s = self.results["rounds"][0], self.results["least"]
        labels = labels * (self.round >= self.rounds_of_all)
        last, share = (min(n * p, self.max_clean_fraction) for n in (self.round, self.round + 1))
        # Only the largest so far are scored anew; no other sample may join.
        nearest = min(last + self.candidates * p, 1.0)
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
        with autocast, attack_precision(self.device.type) as dtype:
            score = partial(self._score, Attacker(self.model, "eval", dtype))
            s = self.of_each(score, labels=False, batch_size=self.scoring_batch_size, subset=subset)
        self.model.train()
        return s

    def _score(self, attacker: Attacker, batch: Batch) -> Tensor:
        x, head = batch["image"], self.model.head
        assert head is not None  # noqa: S101
        place = derive_seed("patches", self.seed, self.round, int(batch["index"][0]))
        draw = torch.Generator(x.device).manual_seed(place)
        score, exact = self.patch_score, self.exact_logits
        return score(x, lambda z: head(attacker.features(z).to(self.dtype)), exact, draw)

    # ------------------------------------------------------------------ algorithm 2, equation 4

    def relearn_view(self) -> View:
        """D without D_c."""
        rest = chosen(~self.results["clean_part"], "left beside those held clean")
        return self.labelled(rest, self.relearn)

    def unlearn_view(self) -> View:
        """D_c, several times over where it is small: a few steps would not make f forget."""
        rows = chosen(self.results["clean_part"], "held to be clean").rows
        times = math.ceil(self.ascent_steps * self.per_step(self.unlearn) / len(rows))
        return self.labelled(Subset(rows.repeat(times)), self.unlearn)

    def begin_enhance(self) -> None:
        """D_c is now what most rounds have forgotten; the first network starts again."""
        labels, a, share = self._look(), self.agreement, self.label_share
        rounds, s = self.results["rounds"][1:], self.results["least"]
        self.results["forgotten"] = fewest_rounds(rounds, s, labels, a, share)
        self.restore("suspect")

    def enhance_view(self) -> View:
        """As many samples of D_c as of the rest, for `enhance_steps` steps."""
        clean, seed = self.results["forgotten"], derive_seed("enhance", self.seed)
        parts = chosen(clean, "forgotten by most rounds"), chosen(~clean, "known to most rounds")
        size = self.enhance_steps * self.per_step(self.enhance) // 2
        rows = torch.cat([drawn(part.rows, size, seed) for part in parts])
        return self.labelled(Subset(rows), self.enhance)

    def enhance_step(self, batch: Batch) -> Tensor:
        """Descent on the rest, ascent on D_c as far as the cap."""
        clean = self.results["forgotten"].to(self.device)[batch["index"]]
        logits, w = self.model(batch["image"]), self.rest_weight
        loss = descent_and_ascent(logits, batch["label"], clean, w, self.cap)
        self.log_terms(enhance_loss=loss)
        return loss

    def begin_identify(self) -> None:
        """Flags the samples of whose label the enhanced network is sure."""
        loss = self.loss_of_each(self.logits_of_each(exact=True), self.labels_of_each())
        self.results["score"] = -loss.float()
        self.results["flagged"] = (-loss).exp() > self.confidence
        self.close_round(self.results["flagged"])
        self.keep("enhanced")

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

    def begin_relabel(self) -> None:
        """The flagged samples get the labels that the new network has proposed."""
        self.keep("before_relabelling")
        named, labels = self.results["proposed"], self.labels_of_each()
        self.results["labels"] = torch.where(self.results["flagged"], named, labels)

    def finetune_view(self) -> View:
        """All of D with the labels as they are now."""
        labels = self.results["labels"]
        return self.labelled(Subset(torch.arange(len(labels)), labels), self.finetune)

    def protocol(self) -> dict[str, Any]:
        """Adds the method."""
        return super().protocol() | {"method": "advrbd", "until": self.until}
