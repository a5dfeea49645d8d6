"""What all purifiers share: the suspect file, the frozen teacher, the defender's images."""

from abc import ABC
from typing import Any, final

import torch
from torch import Tensor

from bdclean.backbones import SplitModel
from bdclean.backbones.head import ProbeHead
from bdclean.backbones.source import WeightsSource
from bdclean.backbones.split import Stem
from bdclean.checks import check_share
from bdclean.errors import ConfigError, counted
from bdclean.functional.seeds import derive_seed
from bdclean.modules.probe import Probe
from bdclean.modules.reading import data_of, num_rows
from bdclean.modules.staged import StagedModule
from bdclean.modules.trainer import is_fitting
from bdclean.types import Batch, ImageFacts, Subset, View


class Purifier(StagedModule, ABC):
    """Purifies the model of a weights file. Subclasses add the training.

    The file is read in `setup("fit")`, so that a restored checkpoint wins over it. In evaluation
    without a checkpoint, the suspect model itself is evaluated.

    Args:
        facts: Facts of the data.
        weights: The suspect file.
        arch: Its architecture, for foreign files.
        width: Channels of its first layer, for foreign files; None takes 64.
        stem: Of ResNets, for foreign files; None takes the CIFAR stem up to 64 pixels.

    Attributes:
        model: The student, which is purified.
        teacher: The suspect, frozen and in evaluation mode, where the method needs it.
        probe: The linear probe that follows; None where the product has no head of its own making.
    """

    teacher: SplitModel  # None where there is none; as `model`
    probe: Probe | None = None

    def __init__(
        self,
        facts: ImageFacts,
        weights: str | None = None,
        arch: str | None = None,
        width: int | None = None,
        stem: Stem | None = None,
    ) -> None:
        super().__init__()
        self.facts = facts
        self.source = WeightsSource(
            weights, arch, width, facts.input_size, facts.mean, facts.std, stem
        )
        self.register_module("teacher", None)

    def make_student(self, suspect: SplitModel) -> SplitModel:
        """Turns a copy of the suspect, which it may change, into the student; here as it is."""
        return suspect

    @property
    def needs_teacher(self) -> bool:
        """Whether training needs the suspect as well as the student."""
        return True

    # ------------------------------------------------------------------ networks

    def setup(self, stage: str) -> None:
        """Reads the suspect; see the class."""
        super().setup(stage)
        if stage != "fit" and not self.has_model() and self.source.is_there:
            self.install(model=self.source.load())

    @final
    def make_networks(self) -> None:
        """The student, and the teacher where there is one."""
        suspect = self.source.load()
        if self.needs.head and suspect.head is None:
            raise ConfigError(
                f"weights={self.source.weights}: the model has no classifier head, so "
                f"{type(self).__name__} has no outputs to work with. Use CBD, which works on "
                "features."
            )
        teacher = suspect.copy() if self.needs_teacher else None
        self.install(model=self.make_student(suspect).train(), teacher=teacher)

    def add_networks(self) -> None:
        """Freezes the teacher, and a head that is solved for."""
        if self._modules["teacher"] is not None:
            self.teacher.requires_grad_(False).eval()
        solved = self.probe is not None and self.probe.solver == "lbfgs"
        if solved and isinstance(self.model.head, ProbeHead):
            self.model.head.requires_grad_(False)

    def check_data(self) -> None:
        """Looks at the probe's images before anything is trained.

        Raises:
            ConfigError: If there are none, or there is nothing to validate.
        """
        if self.probe is not None:
            num_rows(self.trainer, self.probe.view)
        elif self.model.head is None and getattr(data_of(self.trainer), "validate_in_fit", False):
            way_out = ", or set --model.probe" if "probe" in self.hparams else ""
            raise ConfigError(
                "--data.validate_in_fit: there is no classifier to validate without a "
                f"probe; leave it out{way_out}."
            )

    # ------------------------------------------------------------------ the defender's images

    def hold_out(self, share: float, seed: int = 0) -> tuple[Subset, Subset]:
        """Parts the defender's images, for thresholds and rules of stopping.

        Args:
            share: Of the images that are held out, in (0, 1).
            seed: Of the choice.

        Returns:
            The images to train on and those that are held out; no image is in both.

        Raises:
            ConfigError: If one of the parts would be empty.
        """
        check_share("share", share)
        size = num_rows(self.trainer, View("defense"))
        generator = torch.Generator().manual_seed(derive_seed("hold out", seed))
        order = torch.randperm(size, generator=generator)
        held = round(share * size)
        if not 0 < held < size:
            raise ConfigError(
                f"held_out={share} of {counted(size, 'image')} leaves one part empty; give more "
                "images."
            )
        return Subset(order[held:].sort().values), Subset(order[:held].sort().values)

    @torch.no_grad()
    def pseudo_labels(self, batch_size: int = 256) -> Subset:
        """All images of the defender with the answers of the suspect, un-augmented.

        Raises:
            ConfigError: If the method has no teacher, or that has no head.
        """
        teacher = self._modules["teacher"]
        if not isinstance(teacher, SplitModel):
            raise ConfigError(f"{type(self).__name__} keeps no copy of the suspect.")
        teacher.require_head()

        def answers(batch: Batch) -> Tensor:
            logits: Tensor = teacher(batch["image"])
            return logits.argmax(1).cpu()

        labels = torch.cat(
            [answers(batch) for batch in self.read(View("defense", batch_size=batch_size))]
        )
        return Subset(torch.arange(len(labels)), labels)

    # ------------------------------------------------------------------ evaluation and record

    @property
    def untested(self) -> str | None:
        """Before its end a run has no head but one that was drawn, or is half trained."""
        if self.finished or self.probe is None or not self.fitted:
            return None
        return (
            "The run was stopped before its linear probe was trained, so there is no classifier "
            "to measure. Go on with `bdclean fit` and --ckpt_path, without what limited the run "
            "(--trainer.max_steps, --trainer.max_time ...)."
        )

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts nothing as long as the head of the probe is the one that was drawn."""
        probed = self.probe is None or self.finished or self.stage_name == "probe"
        if probed or not is_fitting(self.trainer):
            super().validation_step(batch, batch_idx, dataloader_idx)

    def details(self) -> dict[str, Any]:
        """Whether the method ran to its end, which tells nothing of the backdoor; the probe.

        The probe sees clean labels.
        """
        facts: dict[str, Any] = {"finished": self.fitted and self.finished}
        if self.has_model() and isinstance(self.model.head, ProbeHead) and self.untested is None:
            solver = None if self.probe is None else self.probe.solver
            facts |= {"probe": solver, "probe_labels": "clean"}
        return facts


def replace_by_probe(suspect: SplitModel, num_classes: int, probe: Probe | None) -> SplitModel:
    """The suspect's backbone; its head, if any, is replaced by that of the probe."""
    suspect.replace_head(None if probe is None else num_classes, "probe")
    return suspect
