"""A linear probe on frozen features, as a stage of any plan.

The protocol is that of SSL-Backdoor (Saha et al., CVPR 2022; github.com/UMBCvision/SSL-Backdoor,
`moco/eval_linear.py`), with the last epoch instead of the best one on validation data. See
`bdclean.functional.probe` and docs/methods/linear_probe.md.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bdclean.backbones.head import ProbeHead, cache_features
from bdclean.checks import check_positive
from bdclean.errors import ConfigError
from bdclean.functional.probe import PROBE_MILESTONES
from bdclean.modules.recipe import Recipe
from bdclean.modules.staged import Stage, StagedModule, StageOptimizer
from bdclean.types import Batch, View

Solver = Literal["sgd", "lbfgs"]

PROBE_RECIPE = Recipe(
    epochs=40,
    lr=0.01,
    weight_decay=1e-4,
    schedule="multistep",
    milestones=PROBE_MILESTONES,
    batch_size=256,
)


@dataclass(frozen=True)
class Probe:
    """How a linear probe is trained on the few labelled images of the `probe` role.

    Attributes:
        solver: `sgd` (the protocol of SSL-Backdoor) or `lbfgs` (logistic regression on the cached
            features of un-augmented images, deterministic).
        recipe: For `sgd`; times 0.1 after 3/8 and 3/4 of the epochs. Of it, `lbfgs` takes the
            batch size alone.
        c: For `lbfgs`: C of the penalty.

    Raises:
        ConfigError: If a value is out of its range.
    """

    solver: Solver = "sgd"
    recipe: Recipe = PROBE_RECIPE
    c: float = 0.1

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.solver not in get_args(Solver):
            raise ConfigError(f"probe.solver={self.solver!r}: it must be one of sgd, lbfgs.")
        check_positive("probe.c", self.c)

    @property
    def view(self) -> View:
        """The few labelled images."""
        return self.recipe.view("probe", labels=True)


def probe_stage(module: StagedModule, probe: Probe) -> Stage:
    """The stage; the module's model has a `ProbeHead` by then."""
    return Stage(
        "probe",
        probe.recipe if probe.solver == "sgd" else None,
        begin=partial(_begin, module, probe),
        reads=lambda: probe.view,
        step=partial(_step, module),
        optimizer=partial(_optimizer, module, probe),
    )


def probe_head(module: StagedModule) -> ProbeHead:
    """The head that is trained.

    Raises:
        ConfigError: If there is none.
    """
    head = module.require_model().head
    if not isinstance(head, ProbeHead):
        raise ConfigError("The model has no probe head yet; fit it first.")
    return head


def _begin(module: StagedModule, probe: Probe) -> None:
    """Statistics of the probe's images, un-augmented, and for `lbfgs` the whole solution."""
    module.model.eval()
    features, labels = cache_features(module.model.features, module.read(probe.view))
    if probe.solver == "lbfgs":
        probe_head(module).solve_(features, labels, probe.c)
    else:
        probe_head(module).measure_(features)


def _step(module: StagedModule, batch: Batch) -> Tensor:
    """Cross-entropy of the head on frozen features."""
    module.model.eval()  # batch norm included
    with torch.no_grad():
        features = module.model.features(batch["image"])
    loss = F.cross_entropy(probe_head(module)(features).float(), batch["label"])
    module.log_terms(probe_loss=loss)
    return loss


def _optimizer(module: StagedModule, probe: Probe) -> StageOptimizer:
    """SGD on the head."""
    return module.sgd(probe.recipe, probe_head(module).parameters())
