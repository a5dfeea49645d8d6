"""The metrics of one evaluation: a container that sends each batch where it belongs."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from bdclean.metrics.backdoor import (
    AttackSuccessRate,
    CleanAccuracy,
    HitRate,
    PoisonedAccuracy,
    SuccessFloor,
)
from bdclean.types import Batch

METRICS: tuple[type[HitRate], ...] = (
    CleanAccuracy,
    AttackSuccessRate,
    SuccessFloor,
    PoisonedAccuracy,
)
"""What every evaluation measures, in the order in which tables print it."""

DEFINITIONS = {metric.key: metric.definition for metric in METRICS}
"""What each key of a record means."""


class Scores(nn.Module):
    """One metric of each kind, and a rate for each further test set of an attack.

    A module, so that its counts follow the device.

    Attributes:
        odd: Whether an output was NaN or infinite, on this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.measured = nn.ModuleDict({metric.key: metric() for metric in METRICS})
        self.further = nn.ModuleDict()
        self.odd = torch.zeros((), dtype=torch.bool)

    def items(self) -> Iterator[tuple[str, HitRate]]:
        """Yields pairs of key and metric, in the order in which tables print them."""
        for name, metric in (*self.measured.items(), *self.further.items()):
            assert isinstance(metric, HitRate)  # noqa: S101
            yield name, metric

    def update(self, loader: str, outputs: Tensor, batch: Batch) -> None:
        """Counts one batch of the loader of that name.

        Whether all outputs are finite is kept on their device, and asked for at the end.
        """
        self.odd = self.odd | ~outputs.isfinite().all()
        for _, metric in self._on(loader):
            if metric.optional and not all(name in batch for name in metric.reads):
                continue
            metric.update(outputs, *(batch[name] for name in metric.reads))  # type: ignore[literal-required]

    def start(self, further: Iterable[str], device: torch.device) -> None:
        """Counts from zero, with a rate for each of the further loaders."""
        names = list(further)
        if names != list(self.further):  # Lightning knows a metric it has logged by its identity
            self.further = nn.ModuleDict({name: AttackSuccessRate() for name in names}).to(device)
        for _, metric in self.items():
            metric.reset()
        self.odd = torch.zeros((), dtype=torch.bool, device=device)

    def counts(self) -> dict[str, int]:
        """How many images of each loader all processes have seen; every process has to ask."""
        loaders = dict.fromkeys(metric.loader for metric in METRICS)
        first = {name: next(self._on(name))[1] for name in (*loaders, *self.further)}
        return {name: metric.total_count() for name, metric in first.items()}

    def _on(self, loader: str) -> Iterator[tuple[str, HitRate]]:
        """The metrics of a loader."""
        for name, metric in self.items():
            if loader == (name if name in self.further else metric.loader):
                yield name, metric
