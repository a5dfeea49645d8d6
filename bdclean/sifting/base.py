"""What defences of a labelled training set share: they start from data alone.

Such a method is given samples with labels of which some may be poisoned, and an architecture. It
says which samples it considers poisoned (`Findings`) and trains a model without the backdoor.
Truth about the poison is neither asked for nor reachable.
"""

import json
import math
from abc import ABC
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.backbones.own_network import name_network
from bdclean.backbones.split import Stem
from bdclean.checks import check_positive
from bdclean.errors import ConfigError
from bdclean.functional.precision import full_float32
from bdclean.functional.ranking import share_of
from bdclean.functional.seeds import derive_seed
from bdclean.functional.unlearning import capped_cross_entropy
from bdclean.modules import Needs, Recipe, StagedModule
from bdclean.modules.reading import gather_rows, num_rows
from bdclean.sifting.samples import fingerprint, require_same_samples
from bdclean.types import Batch, Findings, ImageFacts, Subset, View

# Share of a class; a network that is trained without so many of its samples does not know it.
LOST = 0.95


class Sifter(StagedModule, ABC):
    """A staged method on the `train` role and the labels it shows.

    Subclasses put `score` (N,) and, once they judge, `flagged` (N,) into `results`, append what is
    flagged after a round with `close_round`, and call `propose` once the network is clean. Here
    are the parts of plans that methods have in common: views, steps, beginnings.

    Attributes:
        new_weights: What `seed` draws new weights for; set by each method that draws them.
        seed: Of the method's own draws.
        cap: Cross-entropy, in nats, at which `ascend` leaves a sample alone; None sets no limit.
        compares_samples: Whether a run that goes on looks at each sample itself.

    Args:
        facts: Facts of the data.
        recipe: Of every ordinary training.
        arch: See `bdclean.backbones.build`.
        width: Channels of the first stage of our ResNets.
        stem: `auto` takes the CIFAR stem up to 64 pixels.

    Raises:
        ConfigError: If there are fewer than two classes.
    """

    needs = Needs(labels=("untrusted",), images="train")
    new_weights: ClassVar[str]
    seed: int
    cap: float | None = None
    compares_samples = True

    def __init__(
        self,
        facts: ImageFacts,
        recipe: Recipe,
        arch: str = "resnet18",
        width: int = 64,
        stem: Stem = "auto",
    ) -> None:
        super().__init__()
        if facts.num_classes < 2:
            raise ConfigError(
                f"num_classes={facts.num_classes}: poisoned samples are found by their class, so "
                "the data needs at least two."
            )
        name_network(arch)  # a checkpoint may hold it
        self.info = ModelInfo(
            arch, facts.num_classes, facts.input_size, facts.mean, facts.std, width, stem
        )
        self.num_classes, self.recipe = facts.num_classes, recipe

    @property
    def further_scores(self) -> tuple[str, ...]:
        """Names of results that are scores of each sample as well; higher is more suspicious."""
        return ()

    @property
    def shares(self) -> dict[str, float]:
        """Settings that are shares of the data set, of which each must hold a sample."""
        return {}

    def cap_of(self, ascent_cap: float | None) -> float | None:
        """The cap in nats of one in ln K."""
        if ascent_cap is None:
            return None
        return check_positive("ascent_cap", ascent_cap) * math.log(self.num_classes)

    def make_networks(self) -> None:
        """A new network, with weights from torch's own generator."""
        self.install(model=build(self.info))

    def check_data(self) -> None:
        """Looks at the size of the data set before anything is trained.

        Raises:
            ConfigError: If the data set cannot serve single samples, or is too small.
        """
        num_rows(self.trainer, self.labelled(Subset(torch.zeros(1, dtype=torch.long))))
        size = num_rows(self.trainer, self.everything())
        for name, share in self.shares.items():
            if share_of(size, share) < 1:
                raise ConfigError(
                    f"{name}={share}: that is less than one of the {size} training samples; raise "
                    "it, or give more samples."
                )

    def on_fit_start(self) -> None:
        """Looks at all samples: results are kept by row, and hold for the same samples only.

        Raises:
            ConfigError: If those of the run that is resumed were others.
        """
        fingerprints = self.of_each(fingerprint, labels=True)
        if self._resumed:
            require_same_samples(fingerprints, self.results["fingerprints"])
        self.results["fingerprints"] = fingerprints
        super().on_fit_start()

    # ------------------------------------------------------------------ data

    def everything(self) -> View:
        """All samples with their labels, as `recipe` reads them."""
        return self.labelled()

    def unflagged(self) -> View:
        """The samples that are not flagged."""
        return self.labelled(chosen(~self.results["flagged"], "left, since all are flagged"))

    def labelled(self, subset: Subset | None = None, recipe: Recipe | None = None) -> View:
        """Samples with labels; all of them, and as in `self.recipe`, unless said otherwise."""
        return (recipe or self.recipe).view("train", labels=True, subset=subset)

    def per_step(self, recipe: Recipe) -> int:
        """Samples of one step, of all its accumulated batches."""
        return recipe.batch_size * self.trainer.accumulate_grad_batches

    def of_each(
        self,
        function: Callable[[Batch], Tensor],
        *,
        labels: bool,
        batch_size: int = 256,
        subset: Subset | None = None,
    ) -> Tensor:
        """What `function` computes for every sample, un-augmented; the devices share the work.

        Args:
            function: Maps a batch of B samples to (B, ...); it sets the mode of the model.
            labels: Whether its batches carry `label`.
            batch_size: The batches are the same on any number of devices.
            subset: These samples only; the values of all others are zero.

        Returns:
            (N, ...), on the CPU, the same on every rank.

        Raises:
            ConfigError: If a value is not a number.
        """
        view = View("train", batch_size=batch_size, labels=labels, subset=subset)
        # With fewer batches than devices one would have none: each computes all, the first counts.
        few = num_rows(self.trainer, view) <= batch_size * (self.trainer.world_size - 1)
        done = [(function(b), b["index"]) for b in self.read(view, shared=not few)]
        values, index = (torch.cat(part) for part in zip(*done, strict=True))
        if few and not self.trainer.is_global_zero:
            values, index = values[:0], index[:0]
        size = num_rows(self.trainer, replace(view, subset=None))
        table = gather_rows(values, index, size).cpu()
        if not table.isfinite().all():
            raise ConfigError(
                "What the network says of some samples is not a number, because its training "
                "diverged; lower the learning rate."
            )
        return table

    def logits_of_each(self, exact: bool = False) -> Tensor:
        """(N, K), float32; the model in evaluation mode, and in its mode again afterwards.

        Args:
            exact: In float32, for losses that are ranked: in a coarse format the logits of
                well-known samples tie.
        """
        training = self.model.training
        self.model.eval()
        compute = self.exact_logits if exact else self.model
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            logits = self.of_each(lambda batch: compute(batch["image"]).float(), labels=False)
        self.model.train(training)
        return logits

    @torch.no_grad()
    def exact_logits(self, images: Tensor) -> Tensor:
        """In float32: what tells well-known samples apart drowns in a coarser format."""
        with full_float32(images.device.type):
            return self.forward(images)

    def labels_of_each(self) -> Tensor:
        """(N,), as the data shows them."""
        return self.results["fingerprints"][:, 0].long()

    def loss_of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (N,), in float64: in float32 that of well-known samples is 0, a tie."""
        return F.cross_entropy(logits.double(), labels, reduction="none")

    # ------------------------------------------------------------------ parts of plans

    def start_anew(self) -> None:
        """Gives the model new weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.new_weights, self.seed))
            self.model.load_state_dict(build(self.model.info).state_dict())

    def leave_flagged_out(self) -> None:
        """New weights for a training without the flagged samples."""
        self.warn_of_lost_classes()
        self.start_anew()

    def fit_labels(self, batch: Batch) -> Tensor:
        """Cross-entropy of an ordinary training, logged as `loss`."""
        loss = F.cross_entropy(self.model(batch["image"]).float(), batch["label"])
        self.log_terms(loss=loss)
        return loss

    def ascend(self, batch: Batch) -> Tensor:
        """Ascent of the cross-entropy, as far as the cap."""
        loss = -capped_cross_entropy(self.model(batch["image"]), batch["label"], self.cap)
        self.log_terms(unlearn_loss=loss)
        return loss

    def propose(self) -> None:
        """The network, clean by now, names the flagged samples, triggers and all."""
        flagged = self.results["flagged"]
        self.results["proposed"] = torch.where(flagged, self.logits_of_each().argmax(1), -1)

    def warn_of_lost_classes(self) -> None:
        """Warns, and notes it for the record, if nearly all samples of a class are flagged."""
        labels, flagged = self.labels_of_each(), self.results["flagged"]
        numbers = torch.bincount(labels)
        lost = (torch.bincount(labels[flagged], minlength=len(numbers)) > LOST * numbers).nonzero()
        self.results["lost_classes"] = lost.flatten()
        if len(lost):
            rank_zero_warn(
                f"More than {LOST:.0%} of the samples of the classes {lost.flatten().tolist()} are "
                "flagged, so the network that is trained now will hardly know them."
            )

    # ------------------------------------------------------------------ findings

    def store(self, name: str) -> None:
        """Stores the present weights, to be written as `<name>.safetensors` next to the model's."""
        state = self.model.state_dict().items()
        self.results |= {f"{name}/{key}": value.detach().cpu().clone() for key, value in state}
        self.results[f"retrained_{name}"] = torch.tensor(self._is_new)

    @property
    def _is_new(self) -> bool:
        return "proposed" in self.results

    def restore(self, name: str) -> None:
        """Takes the weights that `store` stored under this name."""
        self.model.load_state_dict(
            {key: self.results[f"{name}/{key}"] for key in self.model.state_dict()}
        )

    def save_artifacts(self, folder: Path) -> None:
        """Writes the networks that were stored on the way."""
        super().save_artifacts(folder)
        for name in {key.split("/")[0] for key in self.results if "/" in key}:
            model = build(self.model.info)
            state = {key: self.results[f"{name}/{key}"] for key in model.state_dict()}
            model.load_state_dict(state)
            retrained = bool(self.results[f"retrained_{name}"])
            facts = self.protocol() | {"retrained": retrained, "network": name}
            save_model(model, folder / f"{name}.safetensors", {"made_by": json.dumps(facts)})

    def close_round(self, flagged: Tensor) -> None:
        """Keeps what is flagged (N,) before the present stage, for reports."""
        rounds = [*self.results.get("rounds", ()), flagged]
        epochs = [*self.results.get("round_epochs", ()), torch.tensor(self.last_epoch)]
        self.results["rounds"] = torch.stack(rounds)
        self.results["round_epochs"] = torch.stack(epochs)

    def findings(self) -> Findings | None:
        """What the results say of each sample; None before there are scores."""
        if "score" not in self.results:
            return None
        score, flagged = self.results["score"], self.results.get("flagged")
        none = torch.full((len(score),), -1)
        return Findings(
            score=score,
            flagged=flagged,
            proposed=self.results.get("proposed", none),
            further={k: self.results[k] for k in self.further_scores if k in self.results},
            rounds=self.results.get("rounds", torch.empty(0, len(score), dtype=torch.bool)),
            round_epochs=self.results.get("round_epochs", torch.empty(0, dtype=torch.long)),
        )

    @property
    def retrained(self) -> bool:
        """Whether the method ran to its end, and `model` is a network of its own making.

        It is not if the method only scores, or only judges.
        """
        return self.finished and self._is_new

    def details(self) -> dict[str, Any]:
        """Whether the method ran to its end, and what it found."""
        facts: dict[str, Any] = {"finished": self.finished, "retrained": self.retrained}
        if "flagged" in self.results:
            facts["num_flagged"] = int(self.results["flagged"].sum())
        if len(self.results.get("lost_classes", ())):
            facts["lost_classes"] = self.results["lost_classes"].tolist()
        return facts


def chosen(mask: Tensor, which: str) -> Subset:
    """The samples of a mask (N,), bool.

    Args:
        mask: The choice.
        which: For the message: "no sample is ...".

    Raises:
        ConfigError: If there is none.
    """
    rows = mask.nonzero().flatten()
    if not len(rows):
        raise ConfigError(
            f"The method cannot go on: no sample is {which}. Change its settings, above all those "
            "of its length and rates."
        )
    return Subset(rows)


def drawn(rows: Tensor, size: int, seed: int) -> Tensor:
    """As many as `size` of the rows (n,), each as often as any other or once more; in any order."""
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.randperm(len(rows), generator=generator) for _ in range(0, size, len(rows))]
    return rows[torch.cat(turns)[:size]]
