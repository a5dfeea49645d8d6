"""Callbacks: saved config, run record, suspects, exact resume, progress and prediction files."""

from bdclean.callbacks.metrics_log import MetricsLog
from bdclean.callbacks.monitors import Monitors
from bdclean.callbacks.predictions import PredictionFiles
from bdclean.callbacks.progress import ProgressLines, StageBar
from bdclean.callbacks.read_test_set import ReadTestSet
from bdclean.callbacks.requeue import Requeue
from bdclean.callbacks.resume import AtomicCheckpointIO, ExactResume
from bdclean.callbacks.run_record import RunRecord
from bdclean.callbacks.save_config import SaveRunConfig
from bdclean.callbacks.suspects import Suspects

__all__ = [
    "AtomicCheckpointIO",
    "ExactResume",
    "MetricsLog",
    "Monitors",
    "PredictionFiles",
    "ProgressLines",
    "ReadTestSet",
    "Requeue",
    "RunRecord",
    "SaveRunConfig",
    "StageBar",
    "Suspects",
]
