r"""AdvrBD: find the poisoned samples of a labelled data set, and train without them.

The method of the AdvrBD paper: a poisoned sample is recognised by its trigger, wherever else the
image is disturbed, so its prediction changes less under an adversarial patch. In the order of
the paper, with D the training set, y~ its labels, and f the network:

    train      f on all of D, as anybody would
    partition  s_i = KL(P(x_i) || P(clip(x_i + m_i * delta_i))), delta_i the worst one in the ball;
               the samples with the largest s_i join D_c, held to be clean      (algorithm 1)
    unlearn    ascent of the cross-entropy on D_c
    relearn    descent of the cross-entropy on D \ D_c                           (algorithm 2)
               (in rounds: f forgets what is clean and keeps the backdoor)
    identify   flagged = {i : argmax f(x_i) = y~_i}
    retrain    a new network on the samples that are not flagged
    relabel    the new network names the flagged samples
    finetune   on all samples, the flagged ones with their new labels

The formulas are reconstructed; docs/methods/advrbd.md tells what is stated.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.attacker import Attacker, attack_precision
from bdclean.backbones.split import Stem
from bdclean.functional.consistency import Inner, PatchScore, PatchShape
from bdclean.functional.perturbation import PGD
from bdclean.functional.seeds import derive_seed
from bdclean.functional.unlearning import capped_cross_entropy
from bdclean.purification.base import check_choice, check_positive, check_share
from bdclean.purification.dataset import DatasetDefense, Recipe, chosen
from bdclean.purification.staged import Stage, StageOptimizer
from bdclean.types import AugmentationName, Batch, Subset, View

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
        patch_shape: `square` or `disc`.
        patch_radius: r in pixels; None takes H / 8.
        epsilon: Radius of the ball, in 8-bit pixel values.
        pgd_steps: Steps of the inner maximisation.
        step_size: As a share of the radius.
        inner: What the inner maximisation maximises; see `adversarial_patch`.
        num_masks: Patches tried for each sample; the score is their mean.
        partition_rate: p, share of D that joins D_c in each round.
        max_clean_fraction: D_c grows no further than this share of D.
        rounds: T.
        unlearn_lr: Of plain SGD.
        unlearn_epochs: Passes over D_c per round.
        unlearn_augmentation: During the ascent.
        ascent_cap: A sample is left alone once its cross-entropy exceeds this many ln K.
        relearn_lr: Of SGD.
        relearn_epochs: Passes over the rest per round.
        until: The last thing to be done: `score`, `identify`, `retrain` (the paper's main tables)
            or `relabel`, which includes fine-tuning.
        finetune_epochs: Of the last stage.
        finetune_lr: Of the last stage, cosine.
        scoring_batch_size: Per device, while scoring.
        seed: Of the patches and of the second initialisation.
    """

    further_scores = ("consistency",)

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
        patch_shape: PatchShape = "square",
        patch_radius: int | None = None,
        epsilon: float = 8.0,
        pgd_steps: int = 10,
        step_size: float = 0.25,
        inner: Inner = "kl",
        num_masks: int = 1,
        partition_rate: float = 0.05,
        max_clean_fraction: float = 0.9,
        rounds: int = 18,
        unlearn_lr: float = 0.01,
        unlearn_epochs: int = 1,
        unlearn_augmentation: AugmentationName = "none",
        ascent_cap: float = 2.0,
        relearn_lr: float = 0.01,
        relearn_epochs: int = 1,
        until: Until = "relabel",
        finetune_epochs: int = 10,
        finetune_lr: float = 0.01,
        scoring_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes, input_size, mean, std, arch, width, stem, recipe)
        self.save_hyperparameters(ignore=["recipe"])
        self.patch_score = PatchScore(
            shape=check_choice("patch_shape", patch_shape, PatchShape),
            radius=input_size // 8 if patch_radius is None else patch_radius,
            pgd=PGD(epsilon, pgd_steps, step_size, "relative", "linf", random_start=True),
            inner=check_choice("inner", inner, Inner),
            num_masks=check_positive("num_masks", num_masks),
        )
        self.partition_rate = check_share("partition_rate", partition_rate)
        self.max_clean_fraction = check_share("max_clean_fraction", max_clean_fraction)
        self.rounds = check_positive("rounds", rounds)
        self.unlearn_lr, self.relearn_lr = unlearn_lr, relearn_lr
        self.unlearn_epochs = check_positive("unlearn_epochs", unlearn_epochs)
        self.relearn_epochs = check_positive("relearn_epochs", relearn_epochs)
        self.unlearn_augmentation = unlearn_augmentation
        self.cap = check_positive("ascent_cap", ascent_cap) * math.log(num_classes)
        self.until: Until = check_choice("until", until, Until)
        self.last = replace(
            recipe, epochs=finetune_epochs, lr=finetune_lr, nesterov=False, schedule="cosine"
        )
        self.scoring_batch_size, self.seed = scoring_batch_size, seed
        self._attacker: Attacker | None = None

    def plan(self) -> tuple[Stage, ...]:
        """Train, rounds of enhancement, identify, train anew, relabel."""
        one_round = (
            Stage("partition", 0),
            Stage("unlearn", self.unlearn_epochs),
            Stage("relearn", self.relearn_epochs),
        )
        parts: dict[Until, tuple[Stage, ...]] = {
            "score": (Stage("train", self.recipe.epochs), Stage("score", 0)),
            "identify": (*one_round * self.rounds, Stage("identify", 0)),
            "retrain": (Stage("retrain", self.recipe.epochs),),
            "relabel": (Stage("relabel", 0), Stage("finetune", self.last.epochs)),
        }
        wanted = list(parts)[: list(parts).index(self.until) + 1]
        return tuple(stage for name in wanted for stage in parts[name])

    # ------------------------------------------------------------------ train

    def train_view(self) -> View:
        """All of D."""
        return self.labelled()

    def train_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return self.cross_entropy(batch, "loss")

    def train_optimizer(self) -> StageOptimizer:
        """The recipe's."""
        return self.sgd(self.recipe)

    # ------------------------------------------------------------------ algorithm 1

    def begin_score(self) -> None:
        """The first scores; nothing is flagged yet."""
        self.results["consistency"] = self.results["score"] = -self.inconsistency()
        self.results["flagged"] = torch.zeros(len(self.results["score"]), dtype=torch.bool)

    def begin_partition(self) -> None:
        """Adds the samples with the largest scores to D_c; what it flags so far is logged."""
        self._look()
        score = self.inconsistency() if self.round else -self.results["consistency"]
        clean = self.results.get("clean_part", torch.zeros(len(score), dtype=torch.bool))
        room = int(self.max_clean_fraction * len(score)) - int(clean.sum())
        wanted = min(int(self.partition_rate * len(score)), room)
        ranked = score.masked_fill(clean, -math.inf).sort(descending=True, stable=True).indices
        self.results["clean_part"] = clean.clone()
        self.results["clean_part"][ranked[: max(0, wanted)]] = True

    def inconsistency(self) -> Tensor:
        """s_i of every sample, (N,), in nats; labels are not read."""
        self.model.eval()
        autocast = self.trainer.precision_plugin.forward_context()
        with autocast, attack_precision(self.device.type) as dtype:
            self._attacker = Attacker(self.model, "eval", dtype)
            scores = self.of_each(self._score, labels=False, batch_size=self.scoring_batch_size)
        self._attacker = None
        self.model.train()
        return scores

    def _score(self, batch: Batch) -> Tensor:
        images = batch["image"]
        place = derive_seed("patches", self.seed, self.round, int(batch["index"][0]))
        generator = torch.Generator(images.device).manual_seed(place)
        return self.patch_score(images, self._attacked, self._exact, generator)

    def _attacked(self, images: Tensor) -> Tensor:
        assert self._attacker is not None and self.model.head is not None  # noqa: S101, PT018
        logits: Tensor = self.model.head(self._attacker.features(images))
        return logits

    @torch.no_grad()
    def _exact(self, images: Tensor) -> Tensor:
        """Logits in float32: the divergence of a stable prediction drowns in a coarser format."""
        with torch.autocast(images.device.type, enabled=False):
            return self.forward(images)

    # ------------------------------------------------------------------ algorithm 2

    def unlearn_view(self) -> View:
        """D_c."""
        return self.labelled(chosen(self.results["clean_part"]), self.unlearn_augmentation)

    def unlearn_step(self, batch: Batch) -> Tensor:
        """Ascent of the cross-entropy, as far as the cap."""
        loss = -capped_cross_entropy(self.model(batch["image"]), batch["label"], self.cap)
        self.log_terms(unlearn_loss=loss)
        return loss

    def unlearn_optimizer(self) -> StageOptimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.model.parameters(), self.unlearn_lr)

    def relearn_view(self) -> View:
        """D without D_c."""
        return self.labelled(chosen(~self.results["clean_part"]))

    def relearn_step(self, batch: Batch) -> Tensor:
        """Descent of the cross-entropy."""
        return self.cross_entropy(batch, "relearn_loss")

    def relearn_optimizer(self) -> StageOptimizer:
        """The recipe's at a small, constant rate."""
        return self.sgd(replace(self.recipe, lr=self.relearn_lr, schedule="constant"))

    # ------------------------------------------------------------------ identify

    def begin_identify(self) -> None:
        """Flags the samples whose label the enhanced network still knows."""
        self.results["score"] = -self._look()
        self.results["flagged"] = self.results["rounds"][-1]
        self.keep("enhanced")

    def _look(self) -> Tensor:
        """Logs and keeps what the present network would flag; returns CE of each sample (N,)."""
        logits, labels = self.logits_of_each(), self.labels_of_each()
        loss = F.cross_entropy(logits, labels, reduction="none")
        self.close_round(logits.argmax(1) == labels)
        self.log("round/flagged", self.results["rounds"][-1].float().mean())
        clean = self.results.get("clean_part")
        if clean is not None:
            self.log("round/clean_part", clean.float().mean())
            self.log("round/loss_clean_part", loss[clean].mean())
            self.log("round/loss_rest", loss[~clean].mean())
        return loss

    # ------------------------------------------------------------------ a clean network

    def begin_retrain(self) -> None:
        """New weights."""
        self.start_anew("advrbd retrain", self.seed)

    def retrain_view(self) -> View:
        """What is not flagged."""
        return self.labelled(chosen(~self.results["flagged"]))

    def retrain_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return self.cross_entropy(batch, "retrain_loss")

    retrain_optimizer = train_optimizer

    def begin_relabel(self) -> None:
        """The new network names the flagged samples, triggers and all."""
        self.keep("before_relabelling")
        named = self.logits_of_each().argmax(1)
        self.results["proposed"] = torch.where(self.results["flagged"], named, -1)
        self.results["labels"] = torch.where(self.results["flagged"], named, self.labels_of_each())

    def finetune_view(self) -> View:
        """All of D with the labels as they are now."""
        labels = self.results["labels"]
        return self.labelled(Subset(torch.arange(len(labels)), labels))

    def finetune_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return self.cross_entropy(batch, "finetune_loss")

    def finetune_optimizer(self) -> StageOptimizer:
        """SGD with a small rate."""
        return self.sgd(self.last)

    def protocol(self) -> dict[str, Any]:
        """Adds the method."""
        return super().protocol() | {"method": "advrbd", "until": self.until}
