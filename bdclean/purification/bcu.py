"""Backdoor cleansing with unlabelled data (BCU).

Pang, Sun, Ling, Chen: Backdoor Cleansing with Unlabeled Data. CVPR 2023; the authors' code is
github.com/luluppang/BCU. The suspect is the teacher. The student starts from the suspect's
weights, a random part of which is re-initialised, more of them the deeper the layer:

    W_student = m * W_suspect + (1 - m) * W_fresh,   m ~ Bernoulli(1 - r) element-wise     (3)

and learns the teacher's outputs z_T on unlabelled images, in epoch e of E:

    T = 1 + 3 (e + 1) / E
    L = KL(softmax(z_T / T) || softmax(z_S / T)), mean over the batch, without a factor T^2

docs/methods/bcu.md lists every default with its source.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.backbones import SplitModel, build
from bdclean.backbones.blocks import ordered_blocks
from bdclean.backbones.live import is_live, redrawn
from bdclean.checks import (
    check_choice,
    check_least,
    check_not_negative,
    check_positive,
    check_seed,
)
from bdclean.errors import ConfigError
from bdclean.functional.distillation import hard_label_loss, rising_temperature, tempered_kl
from bdclean.functional.reinitialisation import (
    Strategy,
    block_ratios,
    maskable_count,
    mix_weights_,
    overall_fraction,
)
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Needs, Recipe, Stage, StageOptimizer
from bdclean.purification.base import Purifier
from bdclean.types import Batch, ImageFacts, View

LabelKind = Literal["soft", "hard"]
TemperatureSchedule = Literal["rising", "constant"]
RECIPE = Recipe(epochs=100, lr=0.01, batch_size=256)


class BCU(Purifier):
    """Re-initialises by depth, then distils. Defaults are those of the authors' code.

    Args:
        facts: Facts of the data; the model keeps the classes of its own head.
        strategy: How the ratio r goes with depth: `increasing` (the method), `uniform`,
            `decreasing` and `single_stage` (ablations of about the same overall fraction, fig. 3
            and table 4), or `none`.
        strength: Multiplies all ratios, which are then capped at 1.
        ratios: One ratio for each block of `bdclean.backbones.blocks.ordered_blocks`, from input
            to output, instead of `strategy`; `strength` still multiplies.
        gamma: Growth towards the input per group, for `decreasing`.
        single_group: For `single_stage`: which group between stem and head, from 0.
        reinit_seed: Seed of the fresh weights and of the masks.
        labels: `soft` is the method; `hard` the cross-entropy with the teacher's classes (table 5).
        final_temperature: T of the last epoch, or of all epochs if `constant`.
        temperature_schedule: `rising` as above, or `constant`.
        recipe: Of the distillation. Its schedule steps per epoch, as in the authors' code. The
            augmentation is `weak` for CIFAR-10; the authors take `crop` for GTSRB.
        **kwargs: `weights`, `arch`, `width` and `stem`; see `Purifier`.
    """

    name = "bcu"
    needs = Needs(head=True)

    def __init__(
        self,
        facts: ImageFacts,
        strategy: Strategy = "increasing",
        strength: float = 1.0,
        ratios: list[float] | None = None,
        gamma: float = 1.5,
        single_group: int = 0,
        reinit_seed: int = 0,
        labels: LabelKind = "soft",
        final_temperature: float = 4.0,
        temperature_schedule: TemperatureSchedule = "rising",
        recipe: Recipe = RECIPE,
        **kwargs: Any,
    ) -> None:
        super().__init__(facts, **kwargs)
        self.save_arguments()
        self.strategy: Strategy = check_choice("strategy", strategy, Strategy)
        self.strength, self.ratios = check_not_negative("strength", strength), ratios
        if not all(0 <= ratio <= 1 for ratio in ratios or ()):
            raise ConfigError(f"ratios={ratios}: each must be from 0 to 1.")
        self.gamma = check_least("gamma", gamma, 1)
        self.single_group = check_not_negative("single_group", single_group)
        self.reinit_seed = check_seed("reinit_seed", reinit_seed)
        self.labels: LabelKind = check_choice("labels", labels, LabelKind)
        self.final_temperature = check_positive("final_temperature", final_temperature)
        self.temperature_schedule: TemperatureSchedule = check_choice(
            "temperature_schedule", temperature_schedule, TemperatureSchedule
        )
        self.recipe = recipe

    def plan(self) -> tuple[Stage, ...]:
        """Distil; the student was re-initialised when it was made."""
        stage = Stage(
            "distil",
            self.recipe,
            reads=self.images,
            step=self.distil,
            optimizer=self.distil_optimizer,
        )
        return (stage,)

    # ------------------------------------------------------------------ re-initialisation

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """Eq. (3) over the blocks of the network; norm layers keep the suspect's values.

        Raises:
            ConfigError: If the family of networks is not known.
        """
        generator = torch.Generator().manual_seed(derive_seed("bcu masks", self.reinit_seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("bcu weights", self.reinit_seed))
            fresh = redrawn(suspect) if is_live(suspect) else build(suspect.info)
        blocks = zip(
            ordered_blocks(suspect),
            ordered_blocks(fresh),
            self.block_ratios(suspect)[0],
            strict=True,
        )
        for student_block, fresh_block, ratio in blocks:
            for old, new in zip(student_block.modules, fresh_block.modules, strict=True):
                mix_weights_(old, new, ratio, generator)
        return suspect

    def block_ratios(self, model: SplitModel) -> tuple[list[float], float]:
        """Ratio r of each block, from input to output, and the re-initialised share of all weights.

        Raises:
            ConfigError: If `ratios` does not fit the model, or a setting is out of its range.
        """
        blocks = ordered_blocks(model)
        sizes = [sum(maskable_count(module) for module in block.modules) for block in blocks]
        if self.ratios is None:
            chosen = block_ratios(
                self.strategy,
                [block.group for block in blocks],
                sizes,
                gamma=self.gamma,
                single_group=self.single_group,
                strength=self.strength,
            )
        else:
            chosen = [min(1.0, self.strength * ratio) for ratio in self.ratios]
            if len(chosen) != len(blocks) or min(chosen) < 0:
                names = ", ".join(block.name for block in blocks)
                raise ConfigError(
                    f"ratios={self.ratios}: {len(blocks)} numbers from 0 to 1 are needed, one for "
                    f"each of {names}."
                )
        return chosen, overall_fraction(chosen, sizes)

    # ------------------------------------------------------------------ distillation

    def images(self) -> View:
        """Unlabelled images; the last batch may be smaller."""
        return self.recipe.view("defense")

    def distil(self, batch: Batch) -> Tensor:
        """One step of distillation."""
        images = batch["image"]
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        student_logits = self.model(images)
        if self.labels == "hard":
            loss = hard_label_loss(student_logits, teacher_logits)
        else:
            loss = tempered_kl(student_logits, teacher_logits, self.temperature)
        self.log_terms(loss=loss)
        return loss

    @property
    def temperature(self) -> float:
        """T of the present epoch."""
        if self.temperature_schedule == "constant":
            return self.final_temperature
        return rising_temperature(self.current_epoch, self.recipe.epochs, self.final_temperature)

    def distil_optimizer(self) -> StageOptimizer:
        """SGD on all of the student."""
        optimizer = self.recipe.sgd(self.model.parameters())
        return self.recipe.scheduled(optimizer, self.trainer, self.images(), per="epoch")

    def details(self) -> dict[str, Any]:
        """Adds the ratios and the overall fraction of weights that was drawn again."""
        facts = super().details()
        if self.fitted:
            ratios, fraction = self.block_ratios(self.model)
            facts |= {"reinit_ratios": ratios, "reinit_fraction": fraction}
        return facts
