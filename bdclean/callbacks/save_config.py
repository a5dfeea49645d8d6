"""Keeps the merged config of a fit beside its results, and never overwrites another run's."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from bdclean.callbacks.run_record import is_trial
from bdclean.errors import ConfigError


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
        refusal = self._refusal(folder)
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
        folder = Path(trainer.default_root_dir)
        refusal = self._save(folder) if trainer.is_global_zero else None
        refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            raise ConfigError(refusal)
        self.already_saved = True

    def _save(self, folder: Path) -> str | None:
        refusal = self._refusal(folder)
        if refusal:
            return refusal
        path = folder / self.config_filename
        if self._differs(path):
            path = _numbered(path)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(self._text())
        return None

    def _refusal(self, folder: Path) -> str | None:
        resuming = self.config.get("ckpt_path") is not None
        path = folder / self.config_filename
        if self._differs(path) and not (resuming and self.may_change):
            return f"{path} belongs to a run with another config. {self.way_out}"
        return None

    def _differs(self, path: Path) -> bool:
        return path.is_file() and path.read_text() != self._text()

    def _text(self) -> str:
        config = self.config.clone()
        config["ckpt_path"] = None
        text: str = self.parser.dump(config, skip_none=False)
        return text


def _numbered(path: Path) -> Path:
    number = 1
    while (beside := path.with_stem(f"{path.stem}.{number}")).exists():
        number += 1
    return beside
