"""Shortcut distillation: keeps a network's answers and unlearns the short ways to change them.

Ours; unpublished. A backdoor is the shortest way to change the answers of the suspect f*. For a
batch of unlabelled images x, with a student f that starts as f*:

    delta = argmax D(f*(x), f*(x + delta)), by ascent, in a family of perturbations      (1)
    loss  = D(f*(x), f(x)) + beta * mean of w * D(f*(x), f(x + delta))                   (2)

The perturbation looks at the frozen suspect alone, so the student unlearns what it inherited and
need not become robust on its own, which would cost accuracy. D is what the suspect offers: with a
head, KL of the answers at temperature T times T^2; without, the squared distance of features over
the mean square of the suspect's.

Parents: PBE (Mu et al., CVPR 2023), PUD (2024), SAU (Wei et al., NeurIPS 2023), which need labels;
CBD, of which the head-less form is a relative. docs/methods/shortcut.md has all settings.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bdclean.backbones import SplitModel
from bdclean.backbones.perturber import Perturber, perturb_precision
from bdclean.checks import check_choice, check_not_negative, check_positive, check_seed, check_share
from bdclean.errors import ConfigError
from bdclean.functional.distillation import divergence, feature_distance
from bdclean.functional.families import (
    FEWEST_IMAGES,
    LEAST_CLASSES,
    PROBED_AT_ONCE,
    PROBES,
    Ball,
    Concentration,
    Distance,
    Family,
    Patch,
    Universal,
    concentrations,
    out_of_line,
)
from bdclean.functional.gathering import GATHERED, gathering
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Needs, Recipe, Stage, StageOptimizer
from bdclean.modules.reading import share_buffers
from bdclean.purification.base import Purifier
from bdclean.types import Batch, ImageFacts, Subset, View

Weighting = Literal["all", "flipped", "favourite"]
Perturbed = Literal["suspect", "student"]
RECIPE = Recipe(epochs=8, lr=0.01)
PROBED = 500  # images that choose the families


class ShortcutDistillation(Purifier):
    """Distils the suspect into a copy of itself, with and without perturbations; see the module.

    Args:
        facts: Facts of the data; the model keeps the classes of its own head.
        ball: One family of perturbations; None leaves it out.
        patch: Another one.
        universal: Another one.
        choose: Keep the families in which the suspect's flips pile up in one class, where there are
            any (`families.out_of_line`); without a head, those in which its features gather in one
            point. Without, or where none does, all are kept. The families that are kept share each
            batch out equally.
        perturb: Whose answers the perturbations change: those of the `suspect` (the method), or of
            the `student` (an ablation: adversarial training against the suspect's answers).
        beta: Weight of the second term, at most.
        least_agreement: What the student has to agree with the suspect on held-out images (share of
            equal answers; without a head, mean cosine of features). After an epoch below it, beta
            is halved; after one that is not, it is doubled, up to `beta`. None: it stays.
        weighting: Which perturbed images count: `all`, those that are `flipped` (the suspect names
            another class), or those that are flipped into the class in which most land.
        temperature: T.
        held_out: Share of the images that is not trained on, for what is measured on the way.
        seed: Of their choice, and of the perturbations that measure.
        recipe: Of the distillation.
        **kwargs: `weights`, `arch`, `width` and `stem`; see `Purifier`.

    Raises:
        ConfigError: If a value is out of its range, or there is no family.
    """

    name = "shortcut"
    needs = Needs()

    def __init__(
        self,
        facts: ImageFacts,
        ball: Ball | None = Ball(),  # noqa: B008  (frozen)
        patch: Patch | None = Patch(),  # noqa: B008  (frozen)
        universal: Universal | None = Universal(),  # noqa: B008  (frozen)
        choose: bool = True,
        perturb: Perturbed = "suspect",
        beta: float = 1.0,
        least_agreement: float | None = 0.9,
        weighting: Weighting = "all",
        temperature: float = 2.0,
        held_out: float = 0.1,
        seed: int = 0,
        recipe: Recipe = RECIPE,
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, **kwargs)
        self.save_arguments()
        families: dict[str, Family | None]
        families = {"ball": ball, "patch": patch, "universal": universal}
        self.families = {name: each for name, each in families.items() if each is not None}
        if not self.families:
            raise ConfigError("ball, patch and universal are all null; give one of them.")
        self.choose = choose
        self.perturb: Perturbed = check_choice("perturb", perturb, Perturbed)
        self.beta = check_not_negative("beta", beta)
        self.least_agreement = least_agreement
        if least_agreement is not None:
            check_share("least_agreement", least_agreement)
        self.weighting: Weighting = check_choice("weighting", weighting, Weighting)
        self.temperature = check_positive("temperature", temperature)
        self.held_out, self.seed = check_share("held_out", held_out), check_seed("seed", seed)
        self.recipe = recipe
        self._perturbers: dict[SplitModel, Perturber] = {}

    def plan(self) -> tuple[Stage, ...]:
        """Choose and measure, then distil; what was learned is measured after each epoch."""
        return (
            Stage("choose", begin=self.choose_families),
            Stage("measure", begin=self.measure_suspect),
            Stage("distil", self.recipe, reads=self.images, step=self.distil, optimizer=self.all),
        )

    def images(self) -> View:
        """Unlabelled images, without those that measure."""
        return self.recipe.view("defense", subset=self.hold_out(self.held_out, self.seed)[0])

    def all(self) -> StageOptimizer:
        """SGD on backbone and head."""
        return self.sgd(self.recipe, self.model.parameters())

    # ------------------------------------------------------------------ equations 1 and 2

    def distil(self, batch: Batch) -> Tensor:
        """One step."""
        x = batch["image"]
        with torch.no_grad():
            wanted = self.outputs(self.teacher, x)
        moved = self.perturbed(x, wanted)
        clean, answers = self.outputs(self.model, torch.cat([x, moved])).chunk(2)
        keep = self.distance(wanted, clean).mean()
        unlearn = (self.weights(wanted, moved) * self.distance(wanted, answers)).mean()
        loss = keep + self.betas[self.current_epoch] * unlearn
        self.log_terms(loss=loss, keep=keep, unlearn=unlearn)
        return loss

    def perturbed(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Eq. (1): each family gets its share of the batch, (B, 3, H, W), detached."""
        net = self.teacher if self.perturb == "suspect" else self.model
        families = self.chosen.values()
        with self.answering(net) as predict:
            both = (each.tensor_split(len(families)) for each in (x, wanted))
            return torch.cat(
                [
                    self._moved(family, predict, part, answers)
                    for family, part, answers in zip(families, *both, strict=True)
                ]
            )

    def outputs(self, model: SplitModel, x: Tensor) -> Tensor:
        """Logits (B, K) of a model with a head, or features (B, D), in float32."""
        features = model.features(x)
        outputs: Tensor = features if model.head is None else model.head(features)
        return outputs.float()

    def distance(self, wanted: Tensor, outputs: Tensor) -> Tensor:
        """D of each image, (B,), in float32."""
        if self.model.head is None:
            return feature_distance(wanted, outputs)
        return divergence(wanted, outputs, self.temperature)

    @torch.no_grad()
    def weights(self, wanted: Tensor, moved: Tensor) -> Tensor:
        """The w of eq. (2), (B,)."""
        if self.weighting == "all":
            return torch.ones_like(wanted[:, 0])
        named = self.outputs(self.teacher, moved).argmax(1)
        counted = named != wanted.argmax(1)
        if self.weighting == "favourite":
            counted = counted & (named == named[counted].mode().values if counted.any() else False)
        return counted.float()

    @contextmanager
    def answering(self, net: SplitModel) -> Iterator[Distance]:
        """A folded copy of a network, whose answers are differentiable in the images."""
        with perturb_precision(self.device.type) as dtype:
            if net not in self._perturbers:
                self._perturbers[net] = Perturber(net, "eval", dtype)
            copy = self._perturbers[net]
            if net is self.model:
                copy.refresh_(net)
            head = net.head or nn.Identity()
            yield lambda x: head(copy.features(x).to(self.dtype)).float()

    # ------------------------------------------------------------------ choice of families

    def choose_families(self) -> None:
        """Probes the suspect on images that are trained on, and keeps what stands out."""
        names, stands = list(self.families), set()
        count = LEAST_CLASSES if self.model.head is None else self.model.info.num_classes or 0
        rows = self.hold_out(self.held_out, self.seed)[0].rows
        if self.choose and count >= LEAST_CLASSES and len(rows) >= FEWEST_IMAGES:
            spread = torch.linspace(0, len(rows) - 1, min(PROBED, len(rows))).long()
            parts = list(self.answers(self.teacher, PROBES, Subset(rows[spread]), "choose"))
            stands = {name.split()[0] for name in self.standing_out(torch.cat(parts, 1))}
        kept = [name in stands for name in names]
        self.results["chosen"] = torch.tensor(kept if any(kept) else [True] * len(names))

    def standing_out(self, answers: Tensor) -> tuple[str, ...]:
        """The probes that run along a backdoor, by what they do to answers (1 + F, N, K)."""
        if self.model.head is None:
            found = (gathering(answers[0], after) for after in answers[1:])
            return out_of_line(dict(zip(PROBES, found, strict=True)), GATHERED)
        count = self.model.info.num_classes or 0
        return out_of_line(concentrations(PROBES, answers.argmax(2), count))

    @property
    def chosen(self) -> dict[str, Family]:
        """The families that are unlearned; all before they were chosen."""
        if "chosen" not in self.results:
            return self.families
        names = compress(self.families, self.results["chosen"].tolist())
        return {name: self.families[name] for name in names}

    # ------------------------------------------------------------------ what is measured

    def measure_suspect(self) -> None:
        """What the chosen families do to the suspect."""
        self.results["suspect"] = self.measured(self.teacher)

    def on_train_epoch_end(self) -> None:
        """Logs agreement with the suspect, and what the families do to the student."""
        share_buffers(self)
        self.results["student"] = self.measured(self.model)
        self.results["agreement"] = self.agreement()
        self.log("held_out/agreement", self.results["agreement"])
        self.follow_agreement(self.current_epoch)
        for name, found in self.found("student").items():
            self.log(f"held_out/{name}_flipped", found.flipped)
            self.log(f"held_out/{name}_share", found.share)
        super().on_train_epoch_end()

    @property
    def betas(self) -> list[float]:
        """The beta of each epoch up to the one that runs; after its end, also of the next."""
        found: list[float] = self.results.get("beta", torch.tensor([self.beta])).tolist()
        return found

    def follow_agreement(self, epoch: int) -> None:
        """Sets the beta of the next epoch.

        Args:
            epoch: That has ended, or was stopped: one that goes on ends again.
        """
        betas = self.betas[: epoch + 1]
        now, bound = betas[-1], self.least_agreement
        if bound is not None:
            enough = self.results["agreement"] >= bound
            now = min(2 * now, self.beta) if enough else now / 2
        self.results["beta"] = torch.tensor([*betas, now], dtype=torch.float64)

    def measured(self, model: SplitModel) -> Tensor:
        """Classes (1 + F, N) of held-out images and under the F chosen families; N 0 headless."""
        if model.head is None:
            return torch.zeros(1 + len(self.chosen), 0, dtype=torch.long)
        held = self.hold_out(self.held_out, self.seed)[1]
        parts = self.answers(model, self.chosen, held, "held out")
        return torch.cat([each.argmax(2) for each in parts], 1)

    def agreement(self) -> Tensor:
        """Whether the student answers as the suspect on the held-out images.

        Returns:
            Share of equal answers; without a head, the mean cosine of the features. A scalar.
        """
        if self.model.head is not None:
            suspect, student = (self.results[whose][0] for whose in ("suspect", "student"))
            return (suspect == student).float().mean()
        held, alike = self.hold_out(self.held_out, self.seed)[1], []
        training = self.model.training
        with self.trainer.precision_plugin.forward_context(), torch.no_grad():
            self.model.eval()
            for batch in self.read(View("defense", batch_size=PROBED_AT_ONCE, subset=held)):
                wanted, got = (self.outputs(n, batch["image"]) for n in (self.teacher, self.model))
                alike.append(cosine_similarity(wanted, got).cpu())
            self.model.train(training)
        return torch.cat(alike).mean()

    def answers(
        self, model: SplitModel, families: Mapping[str, Family], rows: Subset, seed: str
    ) -> Iterator[Tensor]:
        """What families do to the answers of a network: logits, or features without a head.

        Args:
            model: The network.
            families: By name.
            rows: Images of the defender.
            seed: What the perturbations are drawn for.

        Yields:
            (1 + F, B, K) of some images, unperturbed and under each family, float32, on the CPU.
        """
        # Those of a class often stand together, and then share a universal perturbation.
        draw = torch.Generator().manual_seed(derive_seed(seed, self.seed))
        rows = Subset(rows.rows[torch.randperm(len(rows.rows), generator=draw)])
        view = View("defense", batch_size=PROBED_AT_ONCE, subset=rows)
        training = model.training
        with self.trainer.precision_plugin.forward_context(), self.answering(model) as predict:
            model.eval()
            for number, batch in enumerate(self.read(view)):
                x = batch["image"]
                with torch.no_grad():
                    before = self.outputs(model, x)
                given = [before]
                for name, family in families.items():
                    drawn = derive_seed(seed, name, self.seed, number)
                    draw = torch.Generator(x.device).manual_seed(drawn)
                    moved = self._moved(family, predict, x, before, draw)
                    with torch.no_grad():
                        given.append(self.outputs(model, moved))
                yield torch.stack(given).float().cpu()
            model.train(training)

    def _moved(
        self,
        family: Family,
        predict: Distance,
        x: Tensor,
        wanted: Tensor,
        draw: torch.Generator | None = None,
    ) -> Tensor:
        return family(x, lambda z: self.distance(wanted, predict(z)), draw)

    def found(self, whose: str) -> dict[str, Concentration]:
        """By family, where it sends the answers of `suspect` or `student`; nothing without a head.

        Args:
            whose: Which of the results.
        """
        classes = self.results[whose]
        if not classes.numel():
            return {}
        return concentrations(self.chosen, classes, self.model.info.num_classes or 0)

    def add_networks(self) -> None:
        """Forgets copies of networks that were there before."""
        super().add_networks()
        self._perturbers = {}

    def check_data(self) -> None:
        """Adds that flips need a head to be seen.

        Raises:
            ConfigError: If `weighting` asks for them without one.
        """
        super().check_data()
        if self.model.head is None and self.weighting != "all":
            raise ConfigError(
                f"weighting={self.weighting}: the suspect has no classifier head, so that no "
                "answer flips; set it to all."
            )

    def details(self) -> dict[str, Any]:
        """Adds what was measured on held-out images, which needs no label."""
        facts = super().details()
        if "student" in self.results:
            known = "feature_cosine" if self.model.head is None else "agreement"
            facts[known] = float(self.results["agreement"])
            facts |= {"families": list(self.chosen), "beta": self.betas[:-1]}
            before, after = self.found("suspect"), self.found("student")
            facts["concentration"] = {
                name: {"before": asdict(before[name]), "after": asdict(after[name])}
                for name in before
            }
        return facts
