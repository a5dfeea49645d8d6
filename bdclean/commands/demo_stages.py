"""The stages of the demo: its settings, its data, and one module per stage."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer

from bdclean.attacks import BadNets
from bdclean.backbones.split import Stem
from bdclean.callbacks import ExactResume, ProgressLines
from bdclean.data import Digits
from bdclean.data.splits import Splits
from bdclean.functional.pgd import PGD
from bdclean.modules import BackdoorModule, Probe, Recipe
from bdclean.purification import BCU, CBD
from bdclean.training import Supervised
from bdclean.training.linear_probe import LinearProbe
from bdclean.types import AugmentationName, ImageFacts

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains, and for how long.

    The defaults were chosen on held-out training images under seeds 10 to 12. The students take
    far fewer steps than in the papers, and larger ones than the published rates of 0.02 (CBD)
    and 0.01 (BCU).

    Attributes:
        num_defense: Clean unlabelled images of the defender.
        num_probe: Clean labelled images of the linear probe, a multiple of 10.
        rate: Share of poisoned training images.
        patch_size: Side of the patch in pixels.
        width: Channels of the first stage of the ResNet-18.
        stem: Of the ResNet-18. That of ImageNet brings the images back to the 8x8 pixels that the
            digits have, and costs a sixteenth.
        victim_epochs: Of one-cycle training.
        victim_lr: Highest learning rate.
        victim_batch: Images per step.
        probe_c: C of the logistic regression that makes a probe.
        cbd_epochs: Of CBD.
        cbd_lr: Start of the cosine schedule.
        cbd_batch: Images per step; an incomplete last batch is left out.
        cbd_epsilon: Radius of the perturbation inside CBD in 8-bit pixel values.
        cbd_pgd_steps: Steps of that perturbation.
        cbd_step_size: Of that perturbation, relative to its radius.
        bcu_epochs: Of distillation.
        bcu_lr: Start of the cosine schedule.
        bcu_batch: Images per step.
        bcu_strength: Multiplies the published shares of weights that are drawn anew.
        bcu_augmentation: Of the images for distillation.
        tsne_iterations: Of each t-SNE, at least 250.
    """

    num_defense: int = 300
    num_probe: int = 100
    rate: float = 0.1
    patch_size: int = 6
    width: int = 16
    stem: Stem = "imagenet"
    victim_epochs: int = 40
    victim_lr: float = 0.1
    victim_batch: int = 64
    probe_c: float = 0.1
    cbd_epochs: int = 20
    cbd_lr: float = 2.0
    cbd_batch: int = 100
    cbd_epsilon: float = 8.0
    cbd_pgd_steps: int = 3
    cbd_step_size: float = 0.4
    bcu_epochs: int = 25
    bcu_lr: float = 0.3
    bcu_batch: int = 100
    bcu_strength: float = 1.0
    bcu_augmentation: AugmentationName = "crop"
    tsne_iterations: int = 500


@dataclass(frozen=True)
class Scores:
    """What one evaluation found, in percent, with the numbers of images."""

    acc: float
    asr: float
    pa: float
    n_clean: int
    n_triggered: int


def make_data(settings: DemoSettings, seed: int, val: int = 0) -> Digits:
    """The digits with a BadNets patch in the lower right corner; target class 0.

    Args:
        settings: Sizes and poisoning rate.
        seed: Of the split and of the choice of poisoned images.
        val: Training images to hold out, on which settings can be compared.
    """
    sizes = Splits(defense=settings.num_defense, probe=settings.num_probe, val=val, seed=seed)
    return Digits(
        attack=BadNets(rate=settings.rate, patch_size=settings.patch_size, seed=seed), splits=sizes
    )


def make_victim(settings: DemoSettings, data: Digits) -> Supervised:
    """Supervised training on the poisoned labels."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, settings.victim_lr, momentum=0.9, weight_decay=5e-4)

    return Supervised(
        facts(data),
        width=settings.width,
        stem=settings.stem,
        batch_size=settings.victim_batch,
        augmentation="none",
        optimizer=optimizer,
        schedule="onecycle",
    )


def make_probe(settings: DemoSettings, data: Digits, weights: Path) -> LinearProbe:
    """A new head for a backbone, solved on the few labelled images."""
    return LinearProbe(facts(data), weights=str(weights), probe=Probe("lbfgs", c=settings.probe_c))


def make_cbd(settings: DemoSettings, data: Digits, weights: Path) -> CBD:
    """CBD with the weights of its paper, followed by the probe of `make_probe`."""
    return CBD(
        facts(data),
        weights=str(weights),
        recipe=Recipe(
            epochs=settings.cbd_epochs,
            lr=settings.cbd_lr,
            batch_size=settings.cbd_batch,
            augmentation="simclr",
        ),
        pgd=PGD(settings.cbd_epsilon, settings.cbd_pgd_steps, settings.cbd_step_size),
        probe=Probe("lbfgs", c=settings.probe_c),
    )


def make_bcu(settings: DemoSettings, data: Digits, weights: Path, seed: int) -> BCU:
    """BCU with the shares of its paper, times `bcu_strength`."""
    return BCU(
        facts(data),
        weights=str(weights),
        strength=settings.bcu_strength,
        reinit_seed=seed,
        recipe=Recipe(
            epochs=settings.bcu_epochs,
            lr=settings.bcu_lr,
            batch_size=settings.bcu_batch,
            augmentation=settings.bcu_augmentation,
        ),
    )


def facts(data: Digits) -> ImageFacts:
    """What every module has to know about the data."""
    return ImageFacts(data.num_classes, data.input_size, data.mean, data.std)


def make_trainer(
    epochs: int = -1, precision: Precision = "32-true", *, lines: bool = True
) -> Trainer:
    """A Trainer that writes no files and shows no bar, for which epochs are too short.

    Args:
        epochs: Length of a fit; -1 where the method knows its own.
        precision: Lightning's.
        lines: Print lines of progress.
    """
    return Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[ExactResume(), ProgressLines()] if lines else [ExactResume()],
    )


def fit(module: BackdoorModule, data: Digits, epochs: int = -1) -> float:
    """Trains, and returns the seconds it took."""
    start = time.perf_counter()
    make_trainer(epochs).fit(module, datamodule=data)
    return time.perf_counter() - start


def measure(module: BackdoorModule, data: Digits, stage: Literal["val", "test"] = "test") -> Scores:
    """Evaluates on the clean and the triggered images of `stage`."""
    trainer = make_trainer()
    if stage == "test":
        results = trainer.test(module, datamodule=data, verbose=False)
    else:
        trainer.limit_val_batches = 1.0
        results = trainer.validate(module, datamodule=data, verbose=False)
    # One dictionary per loader, each with the metrics of both or of its own.
    found = {key: value for result in results for key, value in result.items()}
    counts = module.evaluation_counts(stage)
    return Scores(
        acc=found[f"{stage}/acc"],
        asr=found[f"{stage}/asr"],
        pa=found[f"{stage}/pa"],
        n_clean=counts["n_clean"],
        n_triggered=counts["n_triggered"],
    )
