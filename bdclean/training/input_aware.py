"""Training of the input-aware dynamic attack (IAB; Nguyen and Tran, NeurIPS 2020).

The attacker trains the victim and learns its trigger in the same run: first the mask network
alone, then the pattern network together with the classifier. See docs/attacks/input_aware.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

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
from bdclean.errors import ConfigError, check_not_negative, check_positive
from bdclean.functional.diversity import diversity
from bdclean.metrics.evaluation import BackdoorModule, loader_names
from bdclean.metrics.fitting import own_epochs, share_buffers, viewable_data
from bdclean.types import AugmentationName, Batch, View

_GRADIENTS = "bdclean_input_aware_gradients"  # our entry in a checkpoint


class InputAwareTraining(BackdoorModule):
    """Learns a classifier and its input-aware trigger.

    Target, label rule, `rate` and `cover_rate` are those of the attack in the data module,
    `bdclean.attacks.InputAware` without a trigger file. The first int(rate * B) images of every
    augmented batch carry their own trigger and the attacker's label, the next
    int(cover_rate * B) the trigger of another image and their own label. Defaults are those of
    the official code (VinAIResearch/input-aware-backdoor-attack-release).

    Lightning counts each step of an optimizer, so two per batch in the joint stage.

    Args:
        num_classes: K; comes from the data module.
        input_size: Side of the images, a multiple of 8 from 16; comes from the data module.
        mean: Per channel; comes from the data module.
        std: Per channel; comes from the data module.
        arch: See `bdclean.backbones.build`.
        width: Channels of the first stage of our ResNets; 64 is the standard net.
        stem: `auto` takes the CIFAR stem up to 64 pixels.
        epochs: Of both stages together.
        mask_epochs: Of the first stage, which trains M alone.
        batch_size: Images per step and device.
        augmentation: Applied on the device, before the trigger.
        lr: Of the classifier (SGD).
        momentum: Of the classifier.
        weight_decay: Of the classifier.
        lr_generators: Of G and M (Adam).
        betas: Of G and M.
        milestones: Epochs of the joint stage at which the classifier's rate drops.
        pattern_milestones: Epochs of the joint stage at which G's rate drops.
        mask_milestones: Epochs of the mask stage at which M's rate drops.
        gamma: Factor at a milestone.
        lambda_div: Weight of the diversity of masks, and then of patterns.
        lambda_norm: Weight of the masks' norm.
        mask_density: Value that a mask has for free at each pixel, in [0, 1].
        reproduce_grad_accum: Never clear the gradients of G, as the public codes do (a slip).
    """

    def __init__(
        self,
        num_classes: int,
        input_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arch: str = "resnet18",
        width: int = 64,
        stem: Stem = "auto",
        epochs: int = 600,
        mask_epochs: int = 25,
        batch_size: int = 128,
        augmentation: AugmentationName = "weak",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        lr_generators: float = 0.01,
        betas: tuple[float, float] = (0.5, 0.9),
        milestones: Sequence[int] = (100, 200, 300, 400),
        pattern_milestones: Sequence[int] = (200, 300, 400, 500),
        mask_milestones: Sequence[int] = (10, 20),
        gamma: float = 0.1,
        lambda_div: float = 1.0,
        lambda_norm: float = 100.0,
        mask_density: float = 0.032,
        reproduce_grad_accum: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if not 0 < mask_epochs < epochs:
            raise ConfigError(
                f"model.mask_epochs={mask_epochs}: it must be between 1 and {epochs - 1}, so that "
                f"some of the {epochs} epochs are left for the joint stage."
            )
        if input_size % SIZE_STEP or input_size < 2 * SIZE_STEP:
            raise ConfigError(
                f"data.input_size={input_size}: the trigger networks need a multiple of "
                f"{SIZE_STEP}, at least {2 * SIZE_STEP}."
            )
        self.input_size, self.epochs, self.mask_epochs = input_size, epochs, mask_epochs
        size = check_positive("batch_size", batch_size)
        self.view = View("train", augmentation, batch_size=size, labels=True)
        self.lr = check_not_negative("lr", lr)
        self.momentum = check_not_negative("momentum", momentum)
        self.weight_decay = check_not_negative("weight_decay", weight_decay)
        self.lr_generators = check_not_negative("lr_generators", lr_generators)
        self.betas, self.gamma = betas, gamma
        self.milestones, self.pattern_milestones = milestones, pattern_milestones
        self.mask_milestones = mask_milestones
        self.lambda_div, self.lambda_norm = lambda_div, lambda_norm
        self.mask_density, self.reproduce_grad_accum = mask_density, reproduce_grad_accum
        model = build(ModelInfo(arch, num_classes, input_size, mean, std, width, stem))
        self.model = model.to(memory_format=torch.channels_last)
        self.pattern = TriggerGenerator(3, mean, std)  # G
        self.mask = TriggerGenerator(1, mean, std)  # M
        self._restored: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ the attack

    @property
    def attack(self) -> InputAware:
        """The attack of the data module; a ConfigError if it is another one, or learned."""
        attack = getattr(getattr(self.trainer, "datamodule", None), "attack", None)
        if not isinstance(attack, InputAware) or attack.trigger is not None:
            raise ConfigError(
                "data.init_args.attack: InputAwareTraining learns the trigger of bdclean.attacks."
                "InputAware with trigger null (-c attack/input_aware/official); train on another "
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
        """Takes over the stamping of all images, and asks for training images and labels."""
        _ = self.attack  # refuses another one
        if stage == "fit":
            own_epochs(self.trainer, self.epochs)
            viewable_data(self.trainer).set_view(self.view)

    def configure_optimizers(self) -> list[Optimizer]:
        """SGD for the classifier; Adam for G and for M."""
        return [
            SGD(self.model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay),
            Adam(self.pattern.parameters(), self.lr_generators, self.betas),
            Adam(self.mask.parameters(), self.lr_generators, self.betas),
        ]

    def on_train_start(self) -> None:
        """Puts back the gradients of G that a checkpoint has kept."""
        for name, parameter in self.pattern.named_parameters():
            if name in self._restored:
                parameter.grad = self._restored[name].to(parameter.device)

    def on_train_epoch_start(self) -> None:
        """Sets the learning rates, each by the epochs of its own stage."""
        joint = self.current_epoch - self.mask_epochs
        plan = (
            (self.lr, self.milestones, joint),
            (self.lr_generators, self.pattern_milestones, joint),
            (self.lr_generators, self.mask_milestones, self.current_epoch),
        )
        for optimizer, (rate, milestones, epoch) in zip(self.trainer.optimizers, plan, strict=True):
            passed = sum(epoch >= milestone for milestone in milestones)
            for group in optimizer.param_groups:
                group["lr"] = rate * self.gamma**passed

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of the present stage."""
        in_mask_stage = self.current_epoch < self.mask_epochs
        self.mask.train(in_mask_stage)
        if in_mask_stage:
            self._mask_step(batch["image"])
        else:
            self._joint_step(batch["image"], batch["label"])

    def on_train_end(self) -> None:
        """Leaves the same networks on all devices."""
        for network in (self.model, self.pattern, self.mask):
            share_buffers(network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds gradients that the next step goes on with."""
        super().on_save_checkpoint(checkpoint)
        if self.reproduce_grad_accum:
            named = self.pattern.named_parameters()
            checkpoint[_GRADIENTS] = {n: p.grad for n, p in named if p.grad is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps such gradients until the networks are on their device."""
        self._restored = checkpoint.get(_GRADIENTS, {})

    def protocol(self) -> dict[str, Any]:
        """Evaluated with its own head; the attacker has the true labels."""
        return super().protocol() | {"method": "input_aware", "labels": "train"}

    # ------------------------------------------------------------------ the two stages

    def _mask_step(self, images: Tensor) -> None:
        """L_M = lambda_norm * mean(relu(m - density)) + lambda_div * L_div of the masks."""
        others, normalize = _others(images), self.mask.normalize
        mine, theirs = threshold(self.mask(images)), threshold(self.mask(others))
        norm = (mine - self.mask_density).relu().mean()
        div = diversity(normalize(images), normalize(others), mine, theirs)
        loss = self.lambda_norm * norm + self.lambda_div * div
        self._step("mask", loss)
        self._log(loss=loss, norm=norm, div=div, density=mine.mean())

    def _joint_step(self, images: Tensor, labels: Tensor) -> None:
        """Cross-entropy on [backdoor | cross | clean] + lambda_div * L_div of the patterns."""
        attack, others = self.attack, _others(images)
        backdoor, cross = int(len(images) * attack.rate), int(len(images) * attack.cover_rate)
        end = backdoor + cross
        stamped, mine = self._stamp(images[:backdoor], images[:backdoor])
        crossed, theirs = self._stamp(images[backdoor:end], others[backdoor:end])
        wanted = attack.wanted_label(labels[:backdoor], self.model.info.num_classes or 0)
        logits = self(torch.cat([stamped, crossed, images[end:]])).float()
        ce = F.cross_entropy(logits, torch.cat([wanted, labels[backdoor:]]))
        div, pairs = ce.new_zeros(()), min(backdoor, cross)
        if pairs:
            inputs = images[:pairs], others[backdoor : backdoor + pairs]
            parts = [*inputs, mine[:pairs], theirs[:pairs]]
            div = diversity(*(self.pattern.normalize(part) for part in parts))
        loss = ce + self.lambda_div * div
        self._step("joint", loss)
        self._log(loss=loss, ce=ce, div=div)

    def _stamp(self, images: Tensor, donors: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the triggers of `donors`, and the patterns of these; M is fixed."""
        if not len(donors):  # a last batch of less than ten images
            return images, donors
        with torch.no_grad():
            mask = threshold(self.mask(donors))
        pattern = self.pattern(donors)
        return mix(images, pattern, mask), pattern

    def _step(self, stage: Literal["mask", "joint"], loss: Tensor) -> None:
        """Steps what has gradients, since a scaler fails on others; none outlive a batch."""
        if isinstance(self.trainer.strategy, DDPStrategy):
            # A stage trains a part of the networks, and DDP waits for the gradients of all.
            loss = loss + 0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        self.manual_backward(loss)
        classifier, pattern, mask = cast(list[Any], self.optimizers())
        for optimizer in [mask] if stage == "mask" else [classifier, pattern]:
            if any(p.grad is not None for p in optimizer.param_groups[0]["params"]):
                optimizer.step()
        for optimizer in (classifier, pattern, mask):
            if optimizer is not pattern or not self.reproduce_grad_accum:
                optimizer.zero_grad()

    def _log(self, **terms: Tensor) -> None:
        shown = {f"train/{name}": term.detach() for name, term in terms.items()}
        self.log_dict(shown, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)

    # ------------------------------------------------------------------ evaluation

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Features and logits of the images, with the trigger where the loader is to show one."""
        return super().predict_step(self._shown(batch, dataloader_idx), batch_idx, dataloader_idx)

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch, dataloader_idx: int) -> None:
        super()._evaluate(stage, self._shown(batch, dataloader_idx), dataloader_idx)

    def _shown(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch as the learned trigger makes it, in 8 bits, for all loaders but `clean`."""
        name = dict(enumerate(loader_names(self.trainer))).get(dataloader_idx)
        if name not in ("triggered", "cross_acc"):
            return batch
        images, trigger = batch["image"], self.learned_trigger()
        donors = images if name == "triggered" else _others(images)
        stored = trigger.as_stored(trigger.cross(images, donors))
        return {**batch, "image": stored.contiguous(memory_format=torch.channels_last)}


def _others(images: Tensor) -> Tensor:
    """x2: the next image of the batch, which is in random order, in place of a second loader."""
    return images.roll(-1, 0)
