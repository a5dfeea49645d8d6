"""The command line: `bdclean fit | validate | test | predict | attack | sift | demo | config`.

LightningCLI does the work. Added are the links from data to model, the run folder, exact
resume, the run record, and one clear message with exit status 2 for wrong use.
"""

import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

import bdclean
import bdclean.data
import bdclean.purification
import bdclean.training
from bdclean.callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    PredictionFiles,
    ProgressLines,
    ReadTestSet,
    RunRecord,
    SaveRunConfig,
    Suspects,
)
from bdclean.callbacks.read_test_set import has_head
from bdclean.callbacks.trial import is_trial
from bdclean.commands.config import run_config
from bdclean.errors import BdcleanError, ConfigError
from bdclean.experiments.attack import run_attack
from bdclean.experiments.demo import run_demo
from bdclean.experiments.figure import run_figure
from bdclean.experiments.sift import SaveSiftConfig, run_sift
from bdclean.functional.precision import cpu_has_bfloat16
from bdclean.metrics.evaluation import BackdoorModule
from bdclean.shipped import with_paths

LINKED = ("num_classes", "input_size", "mean", "std")
"""Facts of the data set that models receive; they are never written into a config file."""


class BdcleanCLI(LightningCLI):
    """LightningCLI with a run folder, exact resume and links from data to model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run folder, the checkpoint, and the links."""
        parser.add_argument(
            "--run", type=str, default="runs/last", help="Folder that the run writes into."
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Measure ACC, ASR and PA at the end."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {"checkpoint.filename": "last", "checkpoint.enable_version_counter": False}
        )
        parser.link_arguments("run", "checkpoint.dirpath", compute_fn=_checkpoints)
        for fact in LINKED:
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer.

        Raises:
            ConfigError: If one of them needs a package that is not there (a logger, a profiler).
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            missing = _first(error, ImportError)
            if missing is None or _wrong_use(error) is not None:
                raise
            raise ConfigError(f"A package is missing. {missing}") from error

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it was written.

        Lightning reads hyper-parameters out of the file given as --ckpt_path and lets them
        override YAML and command line. Here that file only resumes or evaluates our own run,
        whose config is at hand.
        """

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, writing into the run folder, with whole checkpoints and plain progress."""
        config = self._get(self.config_init, "trainer", default={})
        run = Path(self._run_folder())
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = [
            *(config.get("callbacks") or []),
            ExactResume(),
            RunRecord(str(run)),
            Suspects(str(run)),
            PredictionFiles(str(run)),
        ]
        if self._get(self.config_init, "test_after_fit"):
            callbacks.append(ReadTestSet())
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if not (sys.stderr.isatty() or own_bar) and config.get("enable_progress_bar") is None:
            kwargs["enable_progress_bar"] = False
            callbacks.append(ProgressLines())
        writes = not config.get("fast_dev_run")
        if writes:
            self._require_own(run)
        if config.get("logger") in (None, True):
            if writes:
                _keep_old_metrics(run)
            kwargs["logger"] = CSVLogger(run, name="", version="")
        kwargs |= {"default_root_dir": str(run), "plugins": plugins, "callbacks": callbacks}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {error}") from error
        on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
        if on_cpu and trainer.precision.startswith("bf16") and not cpu_has_bfloat16():
            rank_zero_info(
                "This CPU has no instructions for bfloat16: --trainer.precision 32-true is faster."
            )
        return trainer

    def _require_own(self, run: Path) -> None:
        """Refuses a fit in the folder of another one, before loggers and checkpoints touch it."""
        save = self.save_config_callback
        if self.subcommand == "fit" and save is not None and issubclass(save, SaveRunConfig):
            save(self._parser("fit"), self.config["fit"]).require_own(run)

    def _run_folder(self) -> str:
        """Where this command writes: `--run`, or the folder of the run that is evaluated."""
        checkpoint = self._get(self.config, "ckpt_path")
        if self.subcommand != "fit" and checkpoint:
            folder = Path(checkpoint).resolve().parent.parent
            if (folder / "config.yaml").is_file():
                return str(folder)
        return str(self._get(self.config, "run"))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lets `last` mean the checkpoint of a requeued job as well, if that is the newer one."""
        words: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if words.get("ckpt_path") == "last":
            run = Path(self._run_folder())
            kept = [*run.glob("*.ckpt"), *run.glob("checkpoints/*.ckpt")]
            newest = max(kept, key=lambda path: path.stat().st_mtime, default=run)
            if newest.name.startswith("hpc_ckpt_"):
                words["ckpt_path"] = str(newest)
        return words

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; the logger's folder goes again if nothing was written into it."""
        run = Path(self._run_folder())
        new = not run.exists()
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            if new:
                with suppress(OSError):  # it was not made, or it holds files
                    run.rmdir()
            raise

    def after_fit(self) -> None:
        """Tests the final weights, which are in memory, unless told not to."""
        wanted = self._get(self.config_init, "test_after_fit")
        if not wanted or is_trial(self.trainer) or self.trainer.interrupted:
            return
        if not has_head(self.model):
            self._say("The result has no classifier head; train a probe to measure it.")
            return
        if isinstance(self.model, BackdoorModule) and self.model.untested is not None:
            self._say(f"There is no test. {self.model.untested}")
            return
        self.trainer.test(self.model, datamodule=self.datamodule)

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text)


def _checkpoints(run: str) -> str:
    return f"{run}/checkpoints"


@rank_zero_only
def _keep_old_metrics(run: Path) -> None:
    """Moves the metrics of an earlier start aside, which the logger would delete."""
    old = run / "metrics.csv"
    number = 1
    while (beside := run / f"metrics.{number}.csv").exists():
        number += 1
    if old.is_file():
        old.rename(beside)


# Of Lightning, about what is as it should be here.
_KNOWN_WARNINGS = (
    "Experiment logs directory",  # holds config.yaml before the logger looks at it
    "LightningCLI's args parameter",  # the words are those of the process
    "Total length of `list` across ranks is zero",  # stages without validation
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.12
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Words after `bdclean`; None takes those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a user's modules lie beside the configs; last: they hide nothing
    for told in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=told)
    try:
        words = with_paths(words)
        if words[:1] == ["demo"]:
            run_demo(words[1:])
        elif words[:1] == ["attack"]:
            run_attack(words[1:])
        elif words[:1] == ["figure"]:
            run_figure(words[1:])
        elif words[:1] == ["config"]:
            run_config(words[1:])
        elif words[:1] == ["--version"]:
            print(f"bdclean {bdclean.__version__}")
        elif words[:1] == ["sift"]:
            run_sift(words[1:], _fit)
        else:
            _run(words)
        if distributed.is_available() and distributed.is_initialized():
            # Gloo's threads should not outlive the interpreter; Lightning ends NCCL's group alone.
            distributed.destroy_process_group()
    except SIGTERMException:  # a SystemExit of status 0, as if the run were done
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        wrong_use = _wrong_use(error)
        if wrong_use is None:
            raise
        print(f"bdclean: {wrong_use}", file=sys.stderr)
        sys.exit(2)


def _run(words: list[str], save: type[SaveRunConfig] = SaveRunConfig) -> BdcleanCLI:
    return BdcleanCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=save,
        args=words,
    )


def _fit(words: list[str]) -> tuple[Any, Any]:
    cli = _run(words, SaveSiftConfig)
    return cli.model, cli.datamodule


def _wrong_use(error: BaseException) -> BaseException | None:
    """Our own error behind `error`, or Lightning's of the same meaning."""
    return _first(error, BdcleanError) or _first(error, MisconfigurationException)


def _first(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first of a kind behind `error`; jsonargparse wraps what a class raises in its own."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error
