"""What happens inside BCU: measurements on its student, and ablations it does not offer.

The convolutions of the ResNets used here are all followed by batch norm. Multiplying their
weights, together with the running statistics behind them, leaves the function of the network
as it is, but changes two things: how much a fresh weight weighs beside a kept one, and how far
one step of SGD turns a weight (its rate in effect goes with the inverse square of the scale).
`AblatedBCU` uses that to vary either of the two alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdclean.backbones import SplitModel, build
from bdclean.backbones.batchnorm import batch_norms, reestimate_
from bdclean.backbones.blocks import ordered_blocks
from bdclean.data.datamodule import ImageDataModule
from bdclean.errors import ConfigError
from bdclean.functional.distillation import tempered_kl
from bdclean.functional.reinitialisation import maskable_tensors
from bdclean.metrics.functional import hit_count, percentage
from bdclean.purification import BCU
from bdclean.types import Batch

Norm = Literal["batch", "frozen"]
_BATCH = 100  # of all evaluations and of the re-estimation of batch norm


class AblatedBCU(BCU):
    """BCU with the scale of its weights and its batch norm under control.

    Args:
        weight_scale: Multiplies the suspect's convolutions in the student, whose function stays.
        fresh_scale: Multiplies the fresh convolutions.
        norm: `batch` is the method; `frozen` keeps the student's batch norms at the suspect's
            running statistics.
        settings: Arguments of `BCU`.

    Attributes:
        start: Copy of the student after re-initialisation, before any training.
    """

    start: SplitModel

    def __init__(
        self, settings: dict[str, Any], weight_scale: float, fresh_scale: float, norm: Norm
    ) -> None:
        super().__init__(**settings)
        self.weight_scale, self.fresh_scale, self.norm = weight_scale, fresh_scale, norm

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """Mixes (scale / fresh) * W with W_fresh, then multiplies by `fresh_scale`."""
        rescale_(suspect, self.weight_scale / self.fresh_scale)
        student = super().make_student(suspect)
        rescale_(student, self.fresh_scale)
        self.__dict__["start"] = student.copy()  # not a submodule, so that it is not trained
        return student

    def distil(self, batch: Batch) -> Tensor:
        """Keeps the batch norms in evaluation mode, where they shall stay still."""
        if self.norm == "frozen":
            for norm in batch_norms(self.model):
                norm.eval()
        return super().distil(batch)


@torch.no_grad()
def rescale_(model: nn.Module, factor: float) -> None:
    """Multiplies all convolutions by `factor`, and the running statistics accordingly.

    The function stays, in training as in evaluation mode, up to the epsilon of batch norm.

    Args:
        model: A network in which batch norm follows every convolution.
        factor: Above 0.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.mul_(factor)
    for norm in batch_norms(model):
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)


@dataclass(frozen=True)
class Probes:
    """Images to measure on, float32 in [0, 1].

    Attributes:
        clean: Held-out images (N, 3, H, W).
        labels: Their classes (N,).
        counted: Which of them are behind `triggered` (N,), bool.
        triggered: Held-out images of other classes than the target, with the trigger (M, ...).
        triggered_labels: Their true classes (M,).
        target: The class that the attacker wants.
        defense: The defender's images, clean.
        defense_triggered: The same with the trigger.
    """

    clean: Tensor
    labels: Tensor
    counted: Tensor
    triggered: Tensor
    triggered_labels: Tensor
    target: int
    defense: Tensor
    defense_triggered: Tensor


def make_probes(data: ImageDataModule) -> Probes:
    """The images of the `val` and `defense` roles.

    Raises:
        ConfigError: If the data has no attack with a target class.
    """
    attack, trigger = data.attack, data.trigger
    if attack is None or trigger is None:
        raise ConfigError("data.init_args.attack is not set; there is no backdoor to measure.")
    held_out = data.poisoned_set.role("val", labels=True).everything()
    val, labels = held_out["image"], held_out["label"]
    counted = attack.eligible(labels)
    defense = data.poisoned_set.role("defense").everything()["image"]
    images = (val, trigger.poison(val[counted]), defense, trigger.poison(defense))
    clean, triggered, own, own_triggered = (part.float() / 255 for part in images)
    return Probes(
        clean, labels, counted, triggered, labels[counted], attack.target, own, own_triggered
    )


@torch.no_grad()
def logits_of(model: SplitModel, images: Tensor) -> Tensor:
    """Logits (N, K) in float32, in evaluation mode; the modes are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return torch.cat([model(part).float() for part in torch.split(images, _BATCH)])
    finally:
        for module, mode in modes:
            module.training = mode


def scores(model: SplitModel, probes: Probes) -> dict[str, float]:
    """ACC, ASR and PA in percent on the held-out images, and `untriggered`.

    The last is the share of the images behind the ASR that go to the target without a trigger: a
    network that is broken and always answers the target has an ASR of 100 and no backdoor.
    """
    clean, triggered = logits_of(model, probes.clean), logits_of(model, probes.triggered)
    wanted = torch.full_like(probes.triggered_labels, probes.target)
    return {
        "acc": _percent(clean, probes.labels),
        "asr": _percent(triggered, wanted),
        "pa": _percent(triggered, probes.triggered_labels),
        "untriggered": _percent(clean[probes.counted], wanted),
    }


def _percent(logits: Tensor, wanted: Tensor) -> float:
    return float(percentage(hit_count(logits, wanted), torch.tensor(len(wanted))))


def with_clean_statistics(model: SplitModel, images: Tensor) -> SplitModel:
    """A copy whose batch norms have the statistics of `images`."""
    copy = model.copy().train()
    reestimate_(copy, copy.features, torch.split(images, _BATCH))
    return copy


def teacher_facts(teacher: SplitModel, probes: Probes) -> dict[str, float]:
    """Margin of the target on triggered images, and confidence on clean ones.

    Returns:
        `margin`: mean of z_target - max of the others on triggered images; `margin_clean`: mean
        gap of the two highest logits on clean images; `confidence`: mean highest probability on
        clean images.
    """
    clean = logits_of(teacher, probes.clean)
    top = clean.topk(2, dim=1).values
    return {
        "margin": target_margin(teacher, probes),
        "margin_clean": float((top[:, 0] - top[:, 1]).mean()),
        "confidence": float(clean.softmax(dim=1).amax(dim=1).mean()),
    }


def target_margin(model: SplitModel, probes: Probes) -> float:
    """Mean gap between the target's logit and the highest other one, on triggered images."""
    logits = logits_of(model, probes.triggered)
    others = logits.clone()
    others[:, probes.target] = -torch.inf
    return float((logits[:, probes.target] - others.amax(dim=1)).mean())


def distillation_losses(
    student: SplitModel, teacher: SplitModel, probes: Probes
) -> dict[str, float]:
    """KL(teacher || student) at temperature 1 on the defender's images, clean and triggered."""
    pairs = {"clean": probes.defense, "triggered": probes.defense_triggered}
    return {
        name: float(tempered_kl(logits_of(student, images), logits_of(teacher, images), 1.0))
        for name, images in pairs.items()
    }


def groups_of(model: SplitModel) -> dict[str, list[Tensor]]:
    """Weight tensors (no biases, no norm layers) by stage group: stem, group 1 ..., head."""
    stages = ordered_blocks(model)
    groups: dict[str, list[Tensor]] = {}
    for stage in stages:
        key = stage.name if stage.name in ("stem", "head") else f"group{stage.group}"
        for module in stage.modules:
            weights = [p.detach() for _, p in maskable_tensors(module) if p.ndim > 1]
            groups.setdefault(key, []).extend(weights)
    return groups


def by_group(
    measure: Callable[[Tensor, Tensor], float], one: SplitModel, other: SplitModel
) -> dict[str, float]:
    """Mean over the tensors of each group of `measure(tensor of one, tensor of the other)`."""
    others = groups_of(other)
    return {
        name: _mean(measure(a, b) for a, b in zip(weights, others[name], strict=True))
        for name, weights in groups_of(one).items()
    }


def travelled(end: Tensor, start: Tensor) -> float:
    """||end - start|| / ||start||."""
    return float((end - start).norm() / start.norm())


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two weight tensors."""
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def fresh_over_trained(suspect: SplitModel, seed: int, scale: float) -> dict[str, float]:
    """Spread of fresh weights over that of trained ones, by group.

    Args:
        suspect: Holds the trained weights.
        seed: Of the fresh ones.
        scale: By how much an ablation raises the ratio in the convolutions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build(suspect.info)
    ratios = by_group(lambda new, old: float(new.std() / old.std()), fresh, suspect)
    return {name: ratio * (1.0 if name == "head" else scale) for name, ratio in ratios.items()}


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values)).mean())
