"""`metrics.csv` of a run: what was logged, and nothing before there is something to log."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from bdclean.errors import BdcleanError, FileError
from bdclean.locks import require_held
from bdclean.runs import RunFolder


class MetricsLog(Logger):
    """Lightning's CSV logger, which begins with the first metrics.

    A command that is refused touches no file. The metrics of an earlier start are moved aside. No
    `hparams.yaml` is written: `config.yaml` says all of it.

    Args:
        run: Whose metrics.
    """

    name = version = ""

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        self._run = run
        self._csv: CSVLogger | None = None

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._run.path)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Writes nothing; see the class."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps a line, and writes now and then.

        Raises:
            FileError: If the file cannot be written.
        """
        with self._told():
            if self._csv is None:
                self._run.keep_old_metrics()
                self._csv = CSVLogger(self._run.path, name="", version="")
            self._csv.log_metrics(dict(metrics), step)

    @rank_zero_only
    def save(self) -> None:
        """Writes all lines.

        Raises:
            FileError: If the file cannot be written.
        """
        if self._csv is not None:
            with self._told():
                self._csv.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes all lines; after another error, as far as it can."""
        if status == "success":
            self.save()
        else:
            with suppress(BdcleanError):
                self.save()

    @contextmanager
    def _told(self) -> Iterator[None]:
        require_held(self._run.metrics)
        try:
            yield
        except OSError as error:
            raise FileError(
                f"{self._run.metrics} cannot be written: {error.strerror or error}."
            ) from error
