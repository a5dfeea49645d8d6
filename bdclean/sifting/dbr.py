"""Distinguishment and backdoor removal (D-BR).

Chen, Wu, Wang: Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples. NeurIPS
2022; the authors' code is github.com/SCLBD/Effective_backdoor_defense. Sample distinguishment (SD)
with features h of a network of its own:

    warm:     min E[cross-entropy], without augmentation
    separate: min similarity of the class means of h
    score:    FCT(x) = mean((h(x) - h(T(x)))^2), T a random rotation, then a random shift
              D_c = the floor(alpha_c N) lowest, D_p = the floor(alpha_p N) highest

Backdoor removal (BR) with a second network:

    train:   min E[cross-entropy], the ordinary recipe; this network has the backdoor
    unlearn, relearn, in turns: max E[cross-entropy] over D_p, min E[cross-entropy] over D_c

The steps of `train` and `unlearn` are those of `Sifter`.
docs/methods/dbr.md lists every default with its source.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from bdclean.checks import check_seed
from bdclean.errors import ConfigError
from bdclean.functional.feature_consistency import (
    draw_transforms,
    feature_consistency,
    intra_class_loss,
    rotate_and_shift,
)
from bdclean.functional.ranking import highest, lowest
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Recipe, Stage, StageOptimizer
from bdclean.modules.reading import num_rows, of_all_devices
from bdclean.sifting.base import Sifter, chosen
from bdclean.types import Batch, ImageFacts, View

WARM = Recipe(epochs=2, lr=0.01, schedule="constant", augmentation="none")
SEPARATION = Recipe(epochs=10, lr=0.01, schedule="constant", augmentation="none")
TRAINING = Recipe(epochs=200, lr=0.01, schedule="multistep")
REMOVAL = Recipe(epochs=20, lr=1e-4, schedule="constant")


class DBR(Sifter):
    """Finds samples whose features move under transformations, and unlearns them.

    Defaults are those of the authors' code.

    Args:
        facts: Facts of the data.
        warm: First training of the network that scores.
        separate: Its second one, on the intra-class loss.
        degrees: Rotations are uniform within plus and minus this.
        translate: Shifts are uniform within plus and minus this part of the side.
        clean_part: alpha_c, the part of the data set with the lowest scores, which is relearned.
        poisoned_part: alpha_p, the part with the highest scores, which is unlearned.
        recipe: Ordinary training of the network that is repaired.
        removal: Each epoch is one pass of ascent and one of descent. Its schedule is `constant`.
        seed: Of the transformations and of the second network's weights.
        **kwargs: `arch`, `width` and `stem`; see `Sifter`.

    Raises:
        ConfigError: If a value is out of its range.
    """

    name = "dbr"
    new_weights = "dbr/train"

    def __init__(
        self,
        facts: ImageFacts,
        warm: Recipe = WARM,
        separate: Recipe = SEPARATION,
        degrees: float = 180.0,
        translate: float = 0.2,
        clean_part: float = 0.20,
        poisoned_part: float = 0.05,
        recipe: Recipe = TRAINING,
        removal: Recipe = REMOVAL,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, recipe, **kwargs)
        self.save_arguments()
        if not (min(clean_part, poisoned_part) > 0 and clean_part + poisoned_part <= 1):
            raise ConfigError(
                f"clean_part={clean_part}, poisoned_part={poisoned_part}: they must be above 0 and "
                "add up to at most 1."
            )
        if not 0 <= degrees <= 180 or not 0 <= translate < 1:
            raise ConfigError(
                f"degrees={degrees}, translate={translate}: degrees must lie between 0 and 180, "
                "translate between 0 and 1."
            )
        if removal.schedule != "constant":
            raise ConfigError(
                f"removal.schedule={removal.schedule!r}: it must be constant, because ascent and "
                "descent take turns with one optimizer."
            )
        self.warm, self.separation, self.removal = warm, separate, removal
        self.degrees, self.translate = degrees, translate
        self.clean_part, self.poisoned_part = clean_part, poisoned_part
        self.seed = check_seed("seed", seed)
        self._turns: SGD | None = None  # the optimizer of both passes of the removal

    @property
    def shares(self) -> dict[str, float]:
        """Both parts that are chosen."""
        return {"clean_part": self.clean_part, "poisoned_part": self.poisoned_part}

    def plan(self) -> tuple[Stage, ...]:
        """Sample distinguishment, ordinary training, then ascent and descent in turns."""
        once, turns = replace(self.removal, epochs=1), self.optimizer_of_turns
        down = Stage(
            "unlearn",
            once,
            begin=self.before_removal,
            reads=self.poisoned,
            step=self.ascend,
            optimizer=turns,
        )
        up = Stage("relearn", once, reads=self.clean, optimizer=turns)
        return (
            Stage("warm", self.warm, reads=lambda: self.labelled(recipe=self.warm)),
            Stage(
                "separate",
                self.separation,
                reads=lambda: self.labelled(recipe=self.separation),
                step=self.separate,
            ),
            Stage("score", begin=self.score),
            Stage(
                "train",
                self.recipe,
                begin=self.start_anew,
                reads=self.everything,
                step=self.fit_labels,
            ),
            *((down, up) * self.removal.epochs),
            Stage("propose", begin=self.propose),
        )

    def make_networks(self) -> None:
        """Forgets the optimizer of an earlier fit."""
        super().make_networks()
        self._turns = None

    # ------------------------------------------------------------------ sample distinguishment

    def separate(self, batch: Batch) -> Tensor:
        """Similarity of the class means of the features; the head is not used."""
        features = of_all_devices(self, self.model.features(batch["image"]))
        labels = of_all_devices(self, batch["label"])
        loss = intra_class_loss(features, labels, self.num_classes)
        self.log_terms(separate_loss=loss)
        return loss

    def score(self) -> None:
        """Scores all samples, each under a transformation of its own."""
        size, side = num_rows(self.trainer, self.everything()), self.model.info.input_size
        # For all samples at once: the same on any number of devices.
        generator = torch.Generator().manual_seed(derive_seed("dbr/transforms", self.seed))
        degrees, shifts = draw_transforms(size, side, self.degrees, self.translate, generator)

        def consistency(batch: Batch) -> Tensor:
            images, index = batch["image"], batch["index"].cpu()
            angles, steps = degrees[index].to(images.device), shifts[index].to(images.device)
            transformed = rotate_and_shift(images, angles, steps)
            return feature_consistency(
                self.model.features(images), self.model.features(transformed)
            )

        self.model.eval()
        with torch.no_grad():
            score = self.of_each(consistency, labels=False)
        self.model.train()
        self.results["score"] = score
        self.results["flagged"] = highest(score, self.poisoned_part)
        self.results["clean"] = lowest(score, self.clean_part)

    # ------------------------------------------------------------------ backdoor removal

    def before_removal(self) -> None:
        """Stores the network with the backdoor, before it is changed for the first time."""
        if self.round == 0:
            self.store("backdoored")

    def poisoned(self) -> View:
        """The samples considered poisoned."""
        return self.labelled(chosen(self.results["flagged"], "considered poisoned"), self.removal)

    def clean(self) -> View:
        """The samples considered clean."""
        return self.labelled(chosen(self.results["clean"], "considered clean"), self.removal)

    def optimizer_of_turns(self) -> StageOptimizer:
        """One optimizer for all passes: a pass is short, and the momentum goes on."""
        if self._turns is None:
            self._turns = self.removal.sgd(self.model.parameters())
        return self._turns
