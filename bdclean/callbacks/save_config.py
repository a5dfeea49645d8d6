"""Keeps the merged config of a fit beside its results, and never overwrites another run's."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from bdclean.callbacks.products import clear, foreign, is_barren, overwritten, too_full
from bdclean.errors import ConfigError
from bdclean.modules.trainer import is_trial
from bdclean.runs import RunFolder, canonical, leaves

FIXED = ("model", "data", "seed_everything")
"""Sections of a config that a run goes on with as it began."""
_PLACE = ("run", "checkpoint")
"""Those that say where a run lies."""


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder when the training begins.

    By then whatever can be refused has been. A run that goes on finds its own file and leaves it
    alone. It must have the same method, data and seed; where other settings have changed, the new
    config is written beside the first one, numbered. A fit from the start finds no other run, and
    no checkpoint of its own: it would train over them. What Lightning itself resumes, a requeued
    job, is no fit from the start. The config of a fit that left nothing but it is replaced.

    Attributes:
        may_change: Whether a run may go on with another config at all.
        way_out: What the refusal of another run's folder tells the user to do.
    """

    may_change = True
    way_out = "Choose another folder with --run, or delete that one."

    def require_own(self, folder: Path) -> None:
        """Refuses a folder in which there is something to lose, before anything is touched.

        Raises:
            ConfigError: If `folder` belongs to a run with another config, holds this run, or holds
                files that are not of a run and would be lost.
        """
        refusal = self._refusal(RunFolder(folder))
        if refusal:
            raise ConfigError(refusal)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes nothing yet: a data set or a file may turn out to be missing."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks again on the first process; every process learns of a refusal.

        Raises:
            ConfigError: As `require_own`, or if the disk has no room for the result.
        """
        if self.already_saved or is_trial(trainer):
            return
        run, refusal = self._run(trainer), None
        if trainer.is_global_zero:
            refusal = self._refusal(run) or too_full(run, pl_module)
        refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            raise ConfigError(refusal)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves on the first process."""
        if self.already_saved or is_trial(trainer):
            return
        self.already_saved = True
        if trainer.is_global_zero:
            run = self._run(trainer)
            self._warn_of_changes(run)
            if self._begins_anew(run):
                clear(run)
            if not self._was_moved(run):
                run.save_config(self._text())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if there was nothing to train, unless the run that goes on had ended."""
        if self.config.get("ckpt_path") is None or not self._run(trainer).is_finished:
            self.on_train_start(trainer, pl_module)

    def _run(self, trainer: Trainer) -> RunFolder:
        return RunFolder(Path(trainer.default_root_dir))

    # ------------------------------------------------------------------ what has changed

    def _changes(self, run: RunFolder) -> dict[str, str]:
        """The settings that differ from those that a run began with."""
        if not run.config.is_file():
            return {}
        return differences(run.read_config(), yaml.safe_load(self._text()))

    def _warn_of_changes(self, run: RunFolder) -> None:
        """Says which settings a run that goes on does not have any more."""
        changed = self._changes(run) if self.config.get("ckpt_path") is not None else {}
        if changed:
            listed = "; ".join(f"--{key}: {change}" for key, change in changed.items())
            rank_zero_warn(
                f"{run.path} goes on with other settings, and will not be the run that "
                f"{run.config.name} describes: {listed}."
            )

    def _of_other_settings(self, run: RunFolder) -> str | None:
        """What a run goes on with that it did not begin with; None if that may be."""
        begun = RunFolder.of_checkpoint(str(self.config["ckpt_path"]))
        changed = (self._changes(begun) if begun else {}) | self._changes(run)
        fixed = {key: change for key, change in changed.items() if key.split(".")[0] in FIXED}
        if not fixed:
            return None
        them = "them" if len(fixed) > 1 else "it"
        listed = ", ".join(f"--{key} ({change})" for key, change in fixed.items())
        return (
            f"{listed}: a run goes on with the method, the data and the seed that it began with; "
            f"leave {them} out, or start a new run with --run."
        )

    # ------------------------------------------------------------------ refusals

    def _refusal(self, run: RunFolder) -> str | None:
        checkpoint = self.config.get("ckpt_path")
        lost = overwritten(run, yaml.safe_load(self._text())) or foreign(run, checkpoint)
        if lost or self._begins_anew(run):
            return lost
        another = run.belongs_to_another(self._text())
        if checkpoint is not None:
            if self._would_be_lost(run, str(checkpoint)):
                return (
                    f"--ckpt_path {checkpoint} is of another run than that in {run.path}; give "
                    "another folder with --run, or --ckpt_path last."
                )
            if another and not self.may_change and not self._is_same(run):
                return self._of_another(run)
            return self._of_other_settings(run)
        if not run.config.is_file():
            return None
        if another and not self._is_same(run):
            return self._of_another(run)
        if run.is_finished:
            return (
                f"{run.path} holds this run, and it has ended. Choose another folder with --run, "
                "or delete that one."
            )
        if run.newest_checkpoint() is not None and not run.of_requeues():
            return (
                f"{run.path} holds this run, unfinished. Add --ckpt_path last to go on with it, "
                "or choose another folder with --run."
            )
        return None

    def _would_be_lost(self, run: RunFolder, checkpoint: str) -> bool:
        """Whether a run lies there, and the fit would go on with another one in its place."""
        begun = RunFolder.of_checkpoint(checkpoint)
        if begun is None or begun.path.resolve() == run.path.resolve():
            return False
        return run.is_finished or run.newest_checkpoint() is not None

    def _begins_anew(self, run: RunFolder) -> bool:
        """Whether another fit began here, and left nothing that this one could lose."""
        if self.config.get("ckpt_path") is not None:
            return False
        return run.belongs_to_another(self._text()) and is_barren(run)

    def _of_another(self, run: RunFolder) -> str:
        return f"{run.config} belongs to a run with another config. {self.way_out}"

    def _was_moved(self, run: RunFolder) -> bool:
        """Whether the config that lies there differs in nothing but the folder of the run."""
        if not run.config.is_file():
            return False
        before, now = (
            {key: value for key, value in config.items() if key not in _PLACE}
            for config in (run.read_config(), yaml.safe_load(self._text()))
        )
        return before == now

    def _is_same(self, run: RunFolder) -> bool:
        """Whether the configs differ in nothing but where and on what they run."""
        try:
            return canonical(run.read_config()) == canonical(yaml.safe_load(self._text()))
        except OSError:  # a weights file that one of them names is gone
            return False

    def _text(self) -> str:
        return self._merged

    @cached_property
    def _merged(self) -> str:
        """The config as YAML, which a fit looks at several times."""
        config = self.config.clone()
        config["ckpt_path"] = None
        text: str = self.parser.dump(config, skip_unset=False)
        return text


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The settings in which two configs differ: `before -> now` by the keys that users type.

    Where a weights file is gone, whether it was the same one is not known, and not said.
    """
    try:
        old, new = (dict(leaves(canonical(config))) for config in (before, now))
    except OSError:
        old, new = (dict(leaves(canonical(each, content=False))) for each in (before, now))
    was, is_now = dict(leaves(before)), dict(leaves(now))
    return {
        key.removesuffix(".class_path"): f"{was.get(key)} -> {is_now.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
