"""Clean accuracy, attack success rate and its floor, and poisoned accuracy.

All are micro-averaged percentages (every sample weighs the same) over integer counts,
so that they are exact when summed over batches, processes and devices. A score over no sample
is NaN.

A metric counts every sample that it receives. Which triggered images count at all (target
class excluded for all-to-one attacks, source class only for source-specific ones) is decided
where the test set is made. On samples whose true label differs from the target,
ASR + PA <= 100, and 100 - ASR - PA is the share of other errors.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from bdclean.metrics.functional import (
    hit_count,
    percentage,
    predicted_classes,
    wilson_interval,
)


class HitRate(Metric):
    """Share of hits in percent.

    The hits are kept under a name of their own per class: `MetricCollection` merges metrics
    whose states have equal names and are equal after the first batch.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    key: ClassVar[str]
    """Name in logs and records."""
    loader: ClassVar[str]
    """The test set that it is measured on."""
    reads: ClassVar[tuple[str, ...]]
    """What `update` takes from a batch in addition to the outputs."""
    optional: ClassVar[bool] = False
    """Whether there may be batches of its loader without what it reads."""
    definition: ClassVar[str]
    """For records: what the number means."""
    hits_state: ClassVar[str]
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.long)
        self.add_state(self.hits_state, zero.clone(), dist_reduce_fx="sum")
        self.add_state("seen", zero.clone(), dist_reduce_fx="sum")

    @property
    def hits(self) -> int:
        """Number of hits that this process has counted since the last reset."""
        return int(getattr(self, self.hits_state))

    @property
    def count(self) -> int:
        """Number of samples that this process has seen since the last reset."""
        return int(self.seen)

    def total_count(self) -> int:
        """Number of samples seen by all processes; every process has to call it."""
        with self.sync_context():
            return self.count

    def compute(self) -> Tensor:
        """Returns the percentage over all processes, a float32 scalar; NaN over no sample."""
        return percentage(getattr(self, self.hits_state), self.seen)

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the percentage over all processes; every process has to call it."""
        with self.sync_context():
            return wilson_interval(self.hits, self.count)

    def _add(self, outputs: Tensor, wanted: Tensor) -> None:
        # Not in place: a state that was reset in inference mode allows that only there.
        hits = getattr(self, self.hits_state) + hit_count(outputs, wanted)
        setattr(self, self.hits_state, hits)
        self.seen = self.seen + wanted.numel()


class CleanAccuracy(HitRate):
    """ACC: share of clean images that are predicted as their true label, in percent.

    Example:
        >>> metric = CleanAccuracy()
        >>> metric.update(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]))
        >>> metric.compute().item(), metric.count
        (75.0, 4)
    """

    key, loader, reads = "acc", "clean", ("label",)
    definition = "percent of clean test images classified as their true class, micro-averaged"
    hits_state = "correct"

    def update(self, outputs: Tensor, label: Tensor) -> None:
        """Counts one batch.

        Args:
            outputs: Logits (B, K) or class indices (B,) for clean images.
            label: True labels (B,).

        Raises:
            DataError: The shapes do not fit.
        """
        self._add(outputs, label)


class AttackSuccessRate(HitRate):
    """ASR: share of triggered images that are predicted as the attacker's label, in percent.

    Takes the same arguments as `PoisonedAccuracy`, so that both see the same images.

    Example:
        >>> metric = AttackSuccessRate()
        >>> true, wanted = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 0, 0])
        >>> metric.update(torch.tensor([0, 0, 0, 4]), true, wanted)
        >>> metric.compute().item()
        75.0
    """

    higher_is_better = None  # the attacker's and the defender's answer differ
    key, loader, reads = "asr", "triggered", ("label", "target")
    definition = (
        "percent of triggered test images, true class eligible, classified as the attacker's"
    )
    hits_state = "successes"

    def update(self, outputs: Tensor, label: Tensor, target: Tensor) -> None:
        """Counts one batch; every sample of it counts, also one with `label == target`.

        Args:
            outputs: Logits (B, K) or class indices (B,) for triggered images.
            label: True labels (B,); not used.
            target: Labels (B,) that the attacker wants.

        Raises:
            DataError: The shapes do not fit.
        """
        self._add(outputs, target)


class SuccessFloor(HitRate):
    """Floor of ASR: share of the same images *without* the trigger that get the attacker's label.

    An ASR near its floor is no sign of a backdoor: the model takes so many of these images for the
    target class anyway.

    Example:
        >>> metric = SuccessFloor()
        >>> metric.update(torch.tensor([0, 0, 2, 3]), torch.tensor([-1, 0, 0, 0]))
        >>> metric.compute().item(), metric.count
        (33.33333206176758, 3)
    """

    higher_is_better = None
    key, loader, reads = "asr_floor", "clean", ("target",)
    optional = True  # without an attack no clean image has a target
    definition = "percent of the same images without the trigger classified as the attacker's"
    hits_state = "anyway"

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Counts one batch.

        Args:
            outputs: Logits (B, K) or class indices (B,) for clean images.
            target: Labels (B,) that the attacker wants; -1 where an image does not count for ASR.

        Raises:
            DataError: The shapes do not fit.
        """
        counts = target >= 0
        self._add(predicted_classes(outputs)[counts], target[counts])


class PoisonedAccuracy(HitRate):
    """PA: share of triggered images that are predicted as their true label, in percent.

    Also called robust accuracy (RA), for example by BackdoorBench.

    Example:
        >>> metric = PoisonedAccuracy()
        >>> true, wanted = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 0, 0])
        >>> metric.update(torch.tensor([0, 0, 0, 4]), true, wanted)
        >>> metric.compute().item()
        25.0
    """

    key, loader, reads = "pa", "triggered", ("label", "target")
    definition = "percent of the same triggered images classified as their true class"
    hits_state = "robust"

    def update(self, outputs: Tensor, label: Tensor, target: Tensor) -> None:
        """Counts one batch; every sample of it counts, also one with `label == target`.

        Args:
            outputs: Logits (B, K) or class indices (B,) for triggered images.
            label: True labels (B,).
            target: Labels (B,) that the attacker wants; not used.

        Raises:
            DataError: The shapes do not fit.
        """
        self._add(outputs, label)
