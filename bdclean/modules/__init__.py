"""What every LightningModule of the package stands on; nothing here knows data or attacks."""

from bdclean.modules.base import BackdoorModule
from bdclean.modules.needs import Needs
from bdclean.modules.probe import Probe, probe_head, probe_stage
from bdclean.modules.recipe import Recipe
from bdclean.modules.staged import Stage, StagedModule, StageOptimizer
from bdclean.modules.training import Training

__all__ = [
    "BackdoorModule",
    "Needs",
    "Probe",
    "Recipe",
    "Stage",
    "StageOptimizer",
    "StagedModule",
    "Training",
    "probe_head",
    "probe_stage",
]
