"""Keeps the merged config of a fit beside its results, and never overwrites another run's."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from bdclean.errors import ConfigError


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder when a fit starts.

    An equal file is left alone, so that a requeued job passes. A different one is refused,
    unless the run is being resumed: then the new config is written beside it, numbered.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves on the first process; every process learns of a refusal.

        Raises:
            ConfigError: If the run folder belongs to a run with another config.
        """
        if stage != "fit" or self.already_saved:
            return
        log_dir = trainer.log_dir  # on every process: Lightning broadcasts it
        if log_dir is None:
            return
        refusal = self._save(Path(log_dir)) if trainer.is_global_zero else None
        refusal = trainer.strategy.broadcast(refusal)
        if refusal:
            raise ConfigError(refusal)
        self.already_saved = True

    def _save(self, folder: Path) -> str | None:
        resuming = self.config.get("ckpt_path") is not None
        config = self.config.clone()
        config["ckpt_path"] = None
        text = self.parser.dump(config, skip_none=False)
        path = folder / self.config_filename
        if path.is_file() and path.read_text() != text:
            if not resuming:
                return (
                    f"{path} belongs to a run with another config. Choose another folder with "
                    "--run, delete that one, or continue it with --ckpt_path last."
                )
            path = _numbered(path)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return None


def _numbered(path: Path) -> Path:
    number = 1
    while (beside := path.with_stem(f"{path.stem}.{number}")).exists():
        number += 1
    return beside
