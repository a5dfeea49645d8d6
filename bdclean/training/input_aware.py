"""Training of the input-aware dynamic attack (IAB; Nguyen and Tran, NeurIPS 2020).

The attacker trains the victim and learns its trigger in the same run: first the mask network
alone, then the pattern network together with the classifier. See docs/attacks/input_aware.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from bdclean.attacks.input_aware import (
    SIZE_STEP,
    InputAware,
    InputAwareTrigger,
    TriggerGenerator,
    mix,
    threshold,
)
from bdclean.backbones import ModelInfo, build
from bdclean.backbones.split import Stem
from bdclean.checks import check_between, check_fractions, check_not_negative, check_positive
from bdclean.errors import ConfigError
from bdclean.functional.diversity import diversity
from bdclean.modules import Needs, Recipe, Stage, StagedModule
from bdclean.modules.base import Classifier, Split
from bdclean.modules.reading import data_of
from bdclean.types import Batch, BatchPlace, ImageFacts, View

RECIPE = Recipe(
    epochs=575,
    lr=0.01,
    schedule="multistep",
    milestones=(100 / 575, 200 / 575, 300 / 575, 400 / 575),
)


@dataclass(frozen=True)
class GeneratorRecipe:
    """How a trigger network is trained: Adam with steps down.

    Attributes:
        lr: Learning rate.
        betas: Of Adam.
        milestones: Where the rate falls, as fractions of the stage.

    Raises:
        ConfigError: If a value is out of its range.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.5, 0.9)
    milestones: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values."""
        check_not_negative("lr", self.lr)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={list(self.betas)}: each must be 0 or above and below 1.")
        check_fractions("milestones", self.milestones)


MASK = GeneratorRecipe(milestones=(10 / 25, 20 / 25))
PATTERN = GeneratorRecipe(milestones=(200 / 575, 300 / 575, 400 / 575, 500 / 575))


class InputAwareTraining(StagedModule):
    """Learns a classifier and its input-aware trigger.

    Target, label rule, `rate` and `cover_rate` are those of the attack in the data module,
    `bdclean.attacks.InputAware` without a trigger file. int(rate * B) images of every augmented
    batch carry their own trigger and the attacker's label, int(cover_rate * B) others the trigger
    of another image and their own label. Defaults are those of the official code
    (VinAIResearch/input-aware-backdoor-attack-release).

    Lightning counts each step of an optimizer, so two per batch in the joint stage.

    Args:
        facts: Facts of the data; the side of the images is a multiple of 8 from 16.
        arch: See `bdclean.backbones.build`.
        width: Channels of the first block of our ResNets; 64 is the standard net.
        stem: `auto` takes the CIFAR stem up to 64 pixels.
        mask_epochs: Of the first stage, which trains M alone.
        mask: How M is trained.
        recipe: Of the classifier in the second stage, the joint one. Its schedule is `multistep`
            or `constant`; batches and augmentation are those of both stages.
        pattern: How G is trained in the joint stage.
        gamma: Factor at a milestone.
        lambda_div: Weight of the diversity of masks, and then of patterns.
        lambda_norm: Weight of the masks' norm.
        mask_density: Value that a mask has for free at each pixel, in [0, 1].
        reproduce_grad_accum: Never clear the gradients of G, as the public codes do (a slip).
    """

    name = "input_aware"
    needs = Needs(labels=("train",), images="train")

    def __init__(
        self,
        facts: ImageFacts,
        arch: str = "resnet18",
        width: int = 64,
        stem: Stem = "auto",
        mask_epochs: int = 25,
        mask: GeneratorRecipe = MASK,
        recipe: Recipe = RECIPE,
        pattern: GeneratorRecipe = PATTERN,
        gamma: float = 0.1,
        lambda_div: float = 1.0,
        lambda_norm: float = 100.0,
        mask_density: float = 0.032,
        reproduce_grad_accum: bool = False,
    ) -> None:
        super().__init__()
        self.save_arguments()
        self.automatic_optimization = False
        size = facts.input_size
        if size % SIZE_STEP or size < 2 * SIZE_STEP:
            raise ConfigError(
                f"--data.input_size={size}: the trigger networks need a multiple of "
                f"{SIZE_STEP}, at least {2 * SIZE_STEP}."
            )
        if recipe.schedule not in ("multistep", "constant"):
            raise ConfigError(
                f"recipe.schedule={recipe.schedule!r}: it must be multistep or constant, because "
                "the rates of all three networks fall at milestones."
            )
        self.input_size = size
        self.mask_epochs = check_positive("mask_epochs", mask_epochs)
        self.mask_recipe, self.recipe, self.pattern_recipe = mask, recipe, pattern
        self.gamma = check_not_negative("gamma", gamma)
        self.lambda_div = check_not_negative("lambda_div", lambda_div)
        self.lambda_norm = check_not_negative("lambda_norm", lambda_norm)
        self.mask_density = check_between("mask_density", mask_density, 0, 1)
        self.reproduce_grad_accum = reproduce_grad_accum
        self.info = ModelInfo(arch, facts.num_classes, size, facts.mean, facts.std, width, stem)
        self.install(model=build(self.info))
        self.pattern = TriggerGenerator(3, facts.mean, facts.std)  # G
        self.mask = TriggerGenerator(1, facts.mean, facts.std)  # M
        self._restored: dict[str, Tensor] = {}
        self._ready: tuple[InputAwareTrigger, ...] = ()  # a tuple, as it is no part of the module

    def plan(self) -> tuple[Stage, ...]:
        """The mask network alone, then the pattern network together with the classifier."""
        return (
            Stage(
                "mask",
                epochs=self.mask_epochs,
                reads=self.images,
                step=self.mask_step,
                optimizer=self.mask_optimizer,
            ),
            Stage(
                "joint",
                epochs=self.recipe.epochs,
                reads=self.images,
                step=self.joint_step,
                optimizer=self.joint_optimizers,
            ),
        )

    def make_networks(self) -> None:
        """They stand since `__init__`, which draws them in the order classifier, G, M."""

    # ------------------------------------------------------------------ the attack

    @property
    def attack(self) -> InputAware:
        """The attack of the data module; a ConfigError if it is another one, or learned."""
        attack = getattr(data_of(self.trainer), "attack", None)
        if not isinstance(attack, InputAware) or attack.trigger is not None:
            raise ConfigError(
                "--data.attack: InputAwareTraining learns the trigger of bdclean.attacks."
                "InputAware with trigger null (`-c attack/input_aware/official`); train on another "
                "attack, or with a learned trigger, with bdclean.training.Supervised."
            )
        return attack

    def learned_trigger(self) -> InputAwareTrigger:
        """What G and M have learned so far, on the module's device."""
        return InputAwareTrigger(self.pattern, self.mask, self.input_size, self.attack.quantize)

    def save_artifacts(self, folder: Path) -> None:
        """Writes the learned trigger in place of the empty one of the data module."""
        super().save_artifacts(folder)
        self.learned_trigger().save(folder / "trigger.safetensors")

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuses another attack, or one that has been learned; this module stamps all images."""
        _ = self.attack
        super().setup(stage)

    def on_train_start(self) -> None:
        """Puts back the gradients of G that a checkpoint has kept."""
        super().on_train_start()
        for name, parameter in self.pattern.named_parameters():
            if name in self._restored:
                parameter.grad = self._restored[name].to(parameter.device)

    def on_train_epoch_start(self) -> None:
        """Sets the learning rates: each falls at its milestones, counted in epochs of its stage."""
        plans: dict[str, tuple[Recipe | GeneratorRecipe, ...]] = {
            "mask": (self.mask_recipe,),
            "joint": (self.recipe, self.pattern_recipe),
        }
        stage = self.plan()[self._stage]
        for optimizer, recipe in zip(self.trainer.optimizers, plans[stage.name], strict=True):
            # no rate falls before its first epoch, however short the stage
            falls = [max(1, round(fraction * stage.length)) for fraction in recipe.milestones]
            if isinstance(recipe, Recipe) and recipe.schedule == "constant":
                falls = []
            passed = sum(self.stage_epoch >= epoch for epoch in falls)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * self.gamma**passed

    def on_validation_model_zero_grad(self) -> None:
        """Clears all gradients, as Lightning does when an epoch ends, unless G's are kept."""
        if not self.reproduce_grad_accum:
            super().on_validation_model_zero_grad()

    def kept(self) -> dict[str, Any]:
        """Adds gradients that the next step goes on with."""
        if not self.reproduce_grad_accum:
            return super().kept()
        named = self.pattern.named_parameters()
        return super().kept() | {"gradients": {n: p.grad for n, p in named if p.grad is not None}}

    def restore_kept(self, record: dict[str, Any]) -> None:
        """Keeps such gradients until the networks are on their device."""
        super().restore_kept(record)
        self._restored = record.get("gradients", {})

    def images(self) -> View:
        """Training images with their labels, which the attacker has."""
        return self.recipe.view("train", labels=True)

    # ------------------------------------------------------------------ the two stages

    def mask_optimizer(self) -> list[Optimizer]:
        """Adam for M."""
        recipe = self.mask_recipe
        return [Adam(self.mask.parameters(), recipe.lr, recipe.betas)]

    def joint_optimizers(self) -> list[Optimizer]:
        """SGD for the classifier, Adam for G."""
        recipe = self.pattern_recipe
        adam = Adam(self.pattern.parameters(), recipe.lr, recipe.betas)
        return [self.recipe.sgd(self.model.parameters()), adam]

    def mask_step(self, batch: Batch) -> None:
        """L_M = lambda_norm * mean(relu(m - density)) + lambda_div * L_div of the masks."""
        images = batch["image"]
        self.mask.train()
        others, normalize = _others(images), self.mask.normalize
        mine = threshold(self.mask(images))
        theirs = _others(mine)  # M of the other images: they are of the same batch
        norm = (mine - self.mask_density).relu().mean()
        div = diversity(normalize(images), normalize(others), mine, theirs)
        loss = self.lambda_norm * norm + self.lambda_div * div
        self._step(loss)
        self.log_terms(loss=loss, norm=norm, div=div, density=mine.mean())

    def joint_step(self, batch: Batch) -> None:
        """Cross-entropy on [backdoor | cross | clean] + lambda_div * L_div of the patterns."""
        images, labels = batch["image"], batch["label"]
        self.mask.eval()
        attack, others = self.attack, _others(images)
        place = BatchPlace(0, self.trainer.global_rank, self.trainer.world_size)
        whole = len(images) * place.world_size
        backdoor = place.share(int(whole * attack.rate))
        end = place.share(int(whole * attack.rate) + int(whole * attack.cover_rate))
        cross = end - backdoor
        stamped, mine = self._stamp(images[:backdoor], images[:backdoor])
        crossed, theirs = self._stamp(images[backdoor:end], others[backdoor:end])
        wanted = attack.wanted_label(labels[:backdoor], self.info.num_classes or 0)
        logits = self(torch.cat([stamped, crossed, images[end:]])).float()
        ce = F.cross_entropy(logits, torch.cat([wanted, labels[backdoor:]]))
        div, pairs = ce.new_zeros(()), min(backdoor, cross)
        if pairs:
            inputs = images[:pairs], others[backdoor : backdoor + pairs]
            parts = [*inputs, mine[:pairs], theirs[:pairs]]
            div = diversity(*(self.pattern.normalize(part) for part in parts))
        loss = ce + self.lambda_div * div
        self._step(loss)
        self.log_terms(loss=loss, ce=ce, div=div)

    def _stamp(self, images: Tensor, donors: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the triggers of `donors`, and the patterns of these; M is fixed."""
        if not len(donors):  # a last batch of less than ten images
            return images, donors
        with torch.no_grad():
            mask = threshold(self.mask(donors))
        pattern = self.pattern(donors)
        return mix(images, pattern, mask), pattern

    def _step(self, loss: Tensor) -> None:
        """Steps what has gradients, since a scaler fails on others; none outlive a batch."""
        self._ready = ()
        self.manual_backward(self.reaching_all(loss))
        for optimizer in self._optimizers():
            if any(p.grad is not None for p in optimizer.param_groups[0]["params"]):
                optimizer.step()
        for network in (self.model, self.pattern, self.mask):
            if network is not self.pattern or not self.reproduce_grad_accum:
                network.zero_grad()

    def _optimizers(self) -> list[Any]:
        """Of the present stage, wrapped by Lightning."""
        optimizers: Any = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    # ------------------------------------------------------------------ evaluation

    def begin_evaluation(self, split: Split) -> dict[str, Classifier]:
        """Takes the trigger once for all batches."""
        self._ready = (self.learned_trigger(),)
        return super().begin_evaluation(split)

    def on_predict_start(self) -> None:
        """Takes the trigger once for all batches."""
        super().on_predict_start()
        self._ready = (self.learned_trigger(),)

    def shown(self, batch: Batch, loader: str) -> Batch:
        """The batch as the learned trigger makes it, in 8 bits, for all loaders but `clean`."""
        if loader not in ("triggered", "cross_acc"):
            return batch
        (trigger,) = self._ready or (self.learned_trigger(),)
        images = batch["image"]
        donors = images if loader == "triggered" else _others(images)
        stored = trigger.as_stored(trigger.cross(images, donors))
        return {**batch, "image": stored.contiguous(memory_format=torch.channels_last)}


def _others(images: Tensor) -> Tensor:
    """x2: the next image of the batch, which is in random order, in place of a second loader."""
    return images.roll(-1, 0)
