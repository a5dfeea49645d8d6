"""Adversarial examples as training rows, for attacks that ask for them (`Attack.adversarial`).

The result is a function of the surrogate's file, the settings, the images and their labels. It is
kept in the user's cache folder under the hash of these four, so that a second run does not pay
for it again.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional as F

from bdclean import weights
from bdclean.attacks import Adversarial
from bdclean.backbones import SplitModel, frozen_copy, load_model
from bdclean.data.decoding import cache_home
from bdclean.errors import AttackError, WeightsError
from bdclean.files import FORMAT_KEY, sha256_of_file, sha256_of_tensor
from bdclean.functional.pgd import PGD, pgd
from bdclean.progress import follow

BATCH_SIZE = 128
TRAINED_BY = "-c train/surrogate/adversarial (or train/surrogate) trains one"

log = logging.getLogger(__name__)


def adversarial_rows(
    perturbation: Adversarial, images: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """The rows after the attack's perturbation, from the cache where they are in it.

    Args:
        perturbation: What the attack asks for.
        images: Clean, un-augmented rows, uint8, (P, 3, H, W).
        labels: Their true labels, (P,).
        num_classes: K of the data set.

    Returns:
        A new uint8 tensor of the same shape, at most epsilon grey levels from `images`.

    Raises:
        AttackError: The surrogate is missing, or was not made for such images and classes.
        WeightsError: Its file is damaged.
    """
    surrogate = _surrogate_file(perturbation)
    store = _cache_file(sha256_of_file(surrogate), perturbation.pgd, images, labels)
    kept = _from_cache(store, images)
    if kept is not None:
        return kept
    model = load_surrogate(surrogate, num_classes, images.shape[-1])
    changed = perturb(model, images, labels, perturbation.pgd)
    try:
        weights.write({"images": changed}, store, {"sha256": sha256_of_tensor(changed)})
    except WeightsError as error:
        log.warning("The perturbed images are not kept for the next run: %s", error)
    return changed


def surrogate_hash(perturbation: Adversarial) -> str | None:
    """SHA-256 of the surrogate's file, as in the record of its own run; None if there is none."""
    if perturbation.surrogate is None:
        return None
    file = Path(perturbation.surrogate).expanduser()
    return sha256_of_file(file) if file.is_file() else None


def load_surrogate(file: Path, num_classes: int, input_size: int) -> SplitModel:
    """Loads a classifier of ours and checks that it fits the data set.

    Raises:
        AttackError: It is not one of ours, has no head, or other classes or another input size.
        WeightsError: The file cannot be read safely.
    """
    if FORMAT_KEY not in weights.read(file)[1]:
        raise AttackError(
            f"attack.surrogate={file}: it does not describe its network; it must be the "
            f"model.safetensors of a run; {TRAINED_BY}"
        )
    model = load_model(file)
    found = (model.info.num_classes, model.info.input_size)
    if found != (num_classes, input_size):
        raise AttackError(
            f"attack.surrogate={file}: it has {found[0] or 'no'} classes and takes images of "
            f"{found[1]} pixels; it must have {num_classes} classes and take {input_size} pixels, "
            f"as the data set does; {TRAINED_BY}"
        )
    return model


@torch.inference_mode(False)
def perturb(model: SplitModel, images: Tensor, labels: Tensor, config: PGD) -> Tensor:
    """Untargeted PGD on the cross-entropy of the true label, in float32, then back to 8 bits.

    Rounded to the nearest level and projected once more onto the ball, whose radius is then a
    whole number of levels. A GPU is used if there is one, with deterministic kernels, so that
    all processes of a run get the same images.

    Args:
        model: The surrogate with its head; left as it is.
        images: uint8, (P, 3, H, W).
        labels: (P,).
        config: Settings.

    Returns:
        uint8, (P, 3, H, W), on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, head = frozen_copy(model).to(device), model.copy().eval().to(device).head
    assert head is not None  # noqa: S101  (checked by `load_surrogate`)

    def of_batch(clean: Tensor, y: Tensor) -> Tensor:
        x = clean.to(torch.float32, memory_format=torch.channels_last) / 255
        loss = lambda z: F.cross_entropy(head(features(z)), y, reduction="sum")  # noqa: E731
        return _as_levels(pgd(x, loss, config), clean, config.epsilon)

    labels = labels.clone()  # the caller may be in inference mode
    changed = torch.empty_like(images)

    def batches() -> Iterator[int]:
        for first in range(0, len(images), BATCH_SIZE):
            part = slice(first, first + BATCH_SIZE)
            changed[part] = of_batch(images[part].to(device), labels[part].to(device)).cpu()
            yield len(changed[part])

    with (
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False),
    ):
        show = getattr(rank_zero_only, "rank", 0) == 0
        follow(batches(), len(images), f"perturbing images on {device}", show=show)
    return changed


def _as_levels(adversarial: Tensor, clean: Tensor, epsilon: float) -> Tensor:
    middle, radius = clean.float(), math.floor(epsilon)
    levels = (adversarial * 255).round()
    return levels.clamp(middle - radius, middle + radius).clamp(0, 255).to(torch.uint8)


def _surrogate_file(perturbation: Adversarial) -> Path:
    if perturbation.surrogate is None:
        raise AttackError(
            "attack.surrogate=null: it must be the weights file of a classifier of the same data "
            f"set; {TRAINED_BY}"
        )
    file = Path(perturbation.surrogate).expanduser()
    if not file.is_file():
        raise AttackError(f"attack.surrogate={file}: there is no such file; {TRAINED_BY}")
    return file


def _cache_file(surrogate: str, config: PGD, images: Tensor, labels: Tensor) -> Path:
    """A file under the user's cache folder that changes whenever its content would."""
    settings = json.dumps({"surrogate": surrogate, "pgd": asdict(config)}, sort_keys=True)
    digest = hashlib.sha256(f"v1 {settings}".encode())
    digest.update(f"{sha256_of_tensor(images)} {sha256_of_tensor(labels.long())}".encode())
    return cache_home() / "perturbations" / f"{digest.hexdigest()[:32]}.safetensors"


def _from_cache(store: Path, images: Tensor) -> Tensor | None:
    """The kept images; None, with a warning where a file is damaged, if they are to be made."""
    if not store.is_file():
        return None
    try:
        tensors, metadata = weights.read(store)
        kept = tensors["images"]
    except (WeightsError, KeyError):
        kept, metadata = torch.empty(0), {}
    if kept.shape == images.shape and sha256_of_tensor(kept) == metadata.get("sha256"):
        return kept
    log.warning("%s is damaged; the perturbed images are made again", store)
    return None
