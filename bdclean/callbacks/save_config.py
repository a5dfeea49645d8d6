"""Keeps the merged config of a fit beside its results, and never overwrites another run's."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from bdclean.errors import ConfigError
from bdclean.modules.trainer import is_trial
from bdclean.runs import RunFolder


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder when a fit starts, after all `setup` hooks.

    An equal file is left alone, so that a requeued job passes. A different one is refused,
    unless the run is being resumed: then the new config is written beside it, numbered.

    Attributes:
        may_change: Whether a resumed run may go on with another config.
        way_out: What a refusal tells the user to do.
    """

    may_change = True
    way_out = (
        "Choose another folder with --run, delete that one, or continue it with --ckpt_path last."
    )

    def require_own(self, folder: Path) -> None:
        """Refuses the folder of another run, before anything in it is touched.

        Raises:
            ConfigError: If `folder` belongs to a run with another config.
        """
        refusal = self._refusal(RunFolder(folder))
        if refusal:
            raise ConfigError(refusal)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes nothing yet: a data set or a file may turn out to be missing."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves on the first process; every process learns of a refusal.

        Raises:
            ConfigError: If the run folder belongs to a run with another config.
        """
        if self.already_saved or is_trial(trainer):
            return
        run = RunFolder(Path(trainer.default_root_dir))
        refusal = self._save(run) if trainer.is_global_zero else None
        refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            raise ConfigError(refusal)
        self.already_saved = True

    def _save(self, run: RunFolder) -> str | None:
        refusal = self._refusal(run)
        if refusal is None:
            run.save_config(self._text())
        return refusal

    def _refusal(self, run: RunFolder) -> str | None:
        resuming = self.config.get("ckpt_path") is not None
        if run.belongs_to_another(self._text()) and not (resuming and self.may_change):
            return f"{run.config} belongs to a run with another config. {self.way_out}"
        return None

    def _text(self) -> str:
        config = self.config.clone()
        config["ckpt_path"] = None
        text: str = self.parser.dump(config, skip_none=False)
        return text
