"""Whether the samples of a training set are still those that results were kept for."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.errors import ConfigError, counted
from bdclean.types import Batch


def fingerprint(batch: Batch) -> Tensor:
    """The label and the mean colours of the four quarters of each image, (B, 13), float32."""
    colours = F.adaptive_avg_pool2d(batch["image"], 2).flatten(1)
    return torch.cat([batch["label"][:, None].to(colours), colours], 1)


def require_same_samples(now: Tensor, before: Tensor) -> None:
    """Compares the fingerprints (N, 13) of the samples with those of the run that is resumed."""
    way_out = "Bring the data back as it was, or start a new run in another folder."
    if len(now) != len(before):
        raise ConfigError(
            f"The checkpoint's run had {counted(len(before), 'training sample')}, and now there "
            "are "
            f"{len(now)}. {way_out}"
        )
    # Another machine may decode or perturb an image by a pixel value more or less.
    others = int(((now - before).abs() > 1 / 255).any(1).sum())
    if others:
        raise ConfigError(
            f"{others} of the {len(now)} training samples {'has' if others == 1 else 'have'} "
            f"another image or label than in the checkpoint's run. {way_out}"
        )
