"""What defences of a labelled training set share: they start from data alone.

Such a method is given samples with labels of which some may be poisoned, and an architecture. It
says which samples it holds to be poisoned (`Findings`) and trains a model without the backdoor.
Truth about the poison is neither asked for nor reachable.
"""

import json
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.backbones.source import FreshSource
from bdclean.backbones.split import SplitModel, Stem
from bdclean.errors import ConfigError
from bdclean.functional.schedules import Schedule
from bdclean.functional.seeds import derive_seed
from bdclean.metrics.fitting import num_rows, scheduled, together
from bdclean.purification.staged import StagedPurifier, StageOptimizer
from bdclean.types import AugmentationName, Batch, Findings, Subset, View


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained from new weights: SGD on the cross-entropy.

    Attributes:
        epochs: At least 1.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        nesterov: Of SGD.
        schedule: Over the whole training.
        milestones: For `multistep`, as fractions of the training.
        batch_size: Per device.
        augmentation: On the device.

    Raises:
        ConfigError: If there is no epoch.
    """

    epochs: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    batch_size: int = 128
    augmentation: AugmentationName = "weak"

    def __post_init__(self) -> None:
        """Checks the length."""
        if self.epochs < 1:
            raise ConfigError(f"recipe.epochs={self.epochs}: it must be at least 1.")


class DatasetDefense(StagedPurifier, ABC):
    """A staged method on the `train` role and the labels it shows.

    Subclasses put `score` (N,), `flagged` (N,) and, if they relabel, `proposed` (N,) into
    `results`, and append what is flagged after a round with `close_round`.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images; comes from the data module.
        mean: Per channel; comes from the data module.
        std: Per channel; comes from the data module.
        arch: See `bdclean.backbones.build`.
        width: Channels of the first stage of our ResNets.
        stem: `auto` takes the CIFAR stem up to 64 pixels.
        recipe: Of every ordinary training.
    """

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arch: str,
        width: int,
        stem: Stem,
        recipe: Recipe,
    ) -> None:
        info = ModelInfo(arch, num_classes, input_size, mean, std, width, stem)
        super().__init__(FreshSource(info))
        self.recipe = recipe

    @property
    def further_scores(self) -> tuple[str, ...]:
        """Names of results that are scores of each sample as well; higher is more suspicious."""
        return ()

    # ------------------------------------------------------------------ data

    def labelled(
        self,
        subset: Subset | None = None,
        augmentation: AugmentationName | None = None,
        batch_size: int | None = None,
    ) -> View:
        """Samples with labels; all of them, and as in the recipe, unless said otherwise."""
        return View(
            "train",
            self.recipe.augmentation if augmentation is None else augmentation,
            batch_size=self.recipe.batch_size if batch_size is None else batch_size,
            labels=True,
            subset=subset,
        )

    def of_each(
        self, function: Callable[[Batch], Tensor], *, labels: bool, batch_size: int = 256
    ) -> Tensor:
        """What `function` computes for every sample, un-augmented; the devices share the work.

        Args:
            function: Maps a batch of B samples to (B, ...); it sets the mode of the model.
            labels: Whether its batches carry `label`.
            batch_size: The batches are the same on any number of devices.

        Returns:
            (N, ...), on the CPU, the same on every rank.
        """
        view = View("train", batch_size=batch_size, labels=labels)
        values, index = [], []
        for batch in self.scan(view, shared=True):
            values.append(function(batch))
            index.append(batch["index"])
        if not values:
            raise ConfigError(
                f"The training set has fewer batches of {batch_size} than there are devices; use "
                "fewer devices."
            )
        size = num_rows(self.trainer, view)
        return together(torch.cat(values), torch.cat(index), size).cpu()

    def logits_of_each(self) -> Tensor:
        """(N, K), float32; the model in evaluation mode, and in its mode again afterwards."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            logits = self.of_each(lambda batch: self.model(batch["image"]).float(), labels=False)
        self.model.train(training)
        return logits

    def labels_of_each(self) -> Tensor:
        """(N,), as the data shows them."""
        return self.of_each(lambda batch: batch["label"], labels=True)

    # ------------------------------------------------------------------ training

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """The network as it was built."""
        return suspect

    @property
    def needs_teacher(self) -> bool:
        """There is no suspect."""
        return False

    def start_anew(self, purpose: str, seed: int) -> None:
        """Gives the model new weights, drawn for `purpose`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(purpose, seed))
            self.model.load_state_dict(build(self.model.info).state_dict())

    def cross_entropy(self, batch: Batch, name: str) -> Tensor:
        """Mean cross-entropy with the labels of the batch, in float32, logged as `name`."""
        loss = F.cross_entropy(self.model(batch["image"]).float(), batch["label"])
        self.log_terms(**{name: loss})
        return loss

    def sgd(self, recipe: Recipe) -> StageOptimizer:
        """SGD on the whole model, with the recipe's schedule over its epochs."""
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            recipe.lr,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        return scheduled(self.trainer, optimizer, recipe.schedule, recipe.epochs, recipe.milestones)

    # ------------------------------------------------------------------ findings

    def keep(self, name: str) -> None:
        """Keeps the present weights, to be written as `<name>.safetensors` beside the model's."""
        state = self.model.state_dict().items()
        self.results |= {f"{name}/{key}": value.detach().cpu().clone() for key, value in state}

    def save_artifacts(self, folder: Path) -> None:
        """Writes the networks that were kept on the way."""
        super().save_artifacts(folder)
        made_by = {"made_by": json.dumps(self.protocol())}
        for name in {key.split("/")[0] for key in self.results if "/" in key}:
            model = build(self.model.info)
            state = {key: self.results[f"{name}/{key}"] for key in model.state_dict()}
            model.load_state_dict(state)
            save_model(model, folder / f"{name}.safetensors", made_by)

    def close_round(self, flagged: Tensor) -> None:
        """Keeps what is flagged (N,) after a round, for reports."""
        rounds = [*self.results.get("rounds", flagged.new_empty(0, len(flagged))), flagged]
        self.results["rounds"] = torch.stack(rounds)

    def findings(self) -> Findings | None:
        """What the results say of each sample; None before they are complete."""
        if not {"score", "flagged"} <= self.results.keys():
            return None
        flagged = self.results["flagged"]
        none = torch.full((len(flagged),), -1)
        return Findings(
            score=self.results["score"],
            flagged=flagged,
            proposed=self.results.get("proposed", none),
            further={k: self.results[k] for k in self.further_scores if k in self.results},
            rounds=self.results.get("rounds", flagged.new_empty(0, len(flagged))),
        )

    def protocol(self) -> dict[str, Any]:
        """Labels are those of the untrusted data set."""
        facts = super().protocol() | {"labels": "untrusted"}
        if "flagged" in self.results:
            facts["num_flagged"] = int(self.results["flagged"].sum())
        return facts


def chosen(mask: Tensor, labels: Tensor | None = None) -> Subset:
    """The samples of a mask (N,), bool, with their own or new labels (N,).

    Raises:
        ConfigError: If there is none.
    """
    rows = mask.nonzero().flatten()
    if not len(rows):
        raise ConfigError(
            "The method has no sample left to train on; it flagged all or none of them. Change "
            "its settings, above all those of its length and rates."
        )
    return Subset(rows, None if labels is None else labels[rows])
