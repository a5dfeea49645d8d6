"""The linear probe: a classifier on the frozen features of any backbone.

The protocol and its source are in `bdclean.modules.probe`.
"""

from dataclasses import replace
from typing import Any

from bdclean.backbones.head import ProbeHead
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.modules import Needs, Probe, Stage, StagedModule, probe_head, probe_stage
from bdclean.types import ImageFacts


class LinearProbe(StagedModule):
    """Puts a new head on the backbone of a weights file, and trains the head alone.

    Args:
        facts: Facts of the data.
        weights: The file; a head in it is replaced.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.
        probe: How the head is trained.
    """

    name = "linear_probe"
    needs = Needs(labels=("clean",), images="probe")

    def __init__(
        self,
        facts: ImageFacts,
        weights: str | None = None,
        arch: str | None = None,
        width: int | None = None,
        stem: Stem | None = None,
        probe: Probe = Probe(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.save_arguments()
        self.source = WeightsSource(
            weights, arch, width, facts.input_size, facts.mean, facts.std, stem
        )
        self.num_classes, self.probe = facts.num_classes, probe

    def plan(self) -> tuple[Stage, ...]:
        """One stage; where the head is solved for, an epoch at a rate of 0 leaves it alone."""
        if self.probe.solver == "sgd":
            return (probe_stage(self, self.probe),)
        # a fit has one epoch at least
        idle = replace(self.probe.recipe, epochs=1, lr=0.0, augmentation="none")
        return (replace(probe_stage(self, replace(self.probe, recipe=idle)), recipe=idle),)

    def setup(self, stage: str) -> None:
        """Reads the file here, so that a restored checkpoint wins over it."""
        super().setup(stage)
        if stage != "fit" and not self.has_model() and self.source.is_there:
            self.install(model=self.source.load())

    def make_networks(self) -> None:
        """The backbone of the file with a new head."""
        model = self.source.load()
        model.replace_head(self.num_classes, "probe")
        self.install(model=model)

    def add_networks(self) -> None:
        """Freezes the backbone."""
        self.model.requires_grad_(False)
        probe_head(self).requires_grad_(True)

    def details(self) -> dict[str, Any]:
        """The head is a probe that has seen clean labels, unless the file is tested as it is."""
        if self.has_model() and isinstance(self.model.head, ProbeHead):
            return {"probe": self.probe.solver}
        return {"labels": "none"}
