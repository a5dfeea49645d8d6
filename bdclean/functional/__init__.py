"""Tensor maths without state: losses, perturbation, distillation, re-initialisation."""

from bdclean.functional.contrastive import nt_xent
from bdclean.functional.distillation import hard_label_loss, rising_temperature, tempered_kl
from bdclean.functional.pgd import PGD, Norm, StepUnit, pgd
from bdclean.functional.reinitialisation import (
    Strategy,
    block_ratios,
    depth_ratio,
    element_mask,
    maskable_count,
    maskable_tensors,
    mix_weights_,
    overall_fraction,
)
from bdclean.functional.seeds import derive_seed

__all__ = [
    "PGD",
    "Norm",
    "StepUnit",
    "Strategy",
    "block_ratios",
    "depth_ratio",
    "derive_seed",
    "element_mask",
    "hard_label_loss",
    "maskable_count",
    "maskable_tensors",
    "mix_weights_",
    "nt_xent",
    "overall_fraction",
    "pgd",
    "rising_temperature",
    "tempered_kl",
]
