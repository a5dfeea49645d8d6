"""`bdclean fit | validate | test | predict`: LightningCLI, with what a run of ours needs.

Added are the links from data to model, the run folder, exact resume, the run record, and what a
command says at its end.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from bdclean import stopping
from bdclean.attacks import Attack
from bdclean.callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    MetricsLog,
    Monitors,
    PredictionFiles,
    ProgressLines,
    ReadTestSet,
    Requeue,
    RunRecord,
    SaveRunConfig,
    StageBar,
    Suspects,
)
from bdclean.callbacks.products import require_files, require_writable
from bdclean.callbacks.read_test_set import has_test_images, why_untested
from bdclean.checks import check_between
from bdclean.commands import closing, making, ranks, run_place, trainer_settings
from bdclean.commands.parsing import in_users_words
from bdclean.commands.quiet import quieten
from bdclean.commands.rooms import import_rooms
from bdclean.commands.run_place import check_run, newest_checkpoint, require_words, run_folder
from bdclean.commands.trainer_help import asks_for_help, trainer_help
from bdclean.commands.words import as_typed, of_run, spelled, values_in
from bdclean.errors import BdcleanError, ConfigError, behind
from bdclean.files import sweep
from bdclean.locks import RunLock, require_held
from bdclean.modules import BackdoorModule
from bdclean.modules.checkpoints import named_checkpoint, odd_state
from bdclean.modules.trainer import is_trial
from bdclean.runs import RunFolder, weights_files
from bdclean.types import ImageFacts

LINKED = tuple(field.name for field in fields(ImageFacts))
"""Facts of the data set that models receive; they are never written into a config file."""


def _command(name: str, words: Sequence[str]) -> None:
    if "--help_all" in spelled(words):
        run(name, ["--help"])
    elif asks_for_help(words):
        import_rooms()
        print(trainer_help(name, words))
    elif name == "fit":
        run(name, words)
    else:
        require_words(name, words)
        words = of_run(words)
        check_run(words)
        run(name, words)


# The commands; each takes the words after its name.
fit = partial(_command, "fit")
validate = partial(_command, "validate")
test = partial(_command, "test")
predict = partial(_command, "predict")


def run(
    name: str,
    words: Sequence[str],
    cli: "Callable[[str, Sequence[str], str], BdcleanCLI] | None" = None,
    again: str | None = None,
) -> "BdcleanCLI":
    """Runs a command of Lightning and returns it with its data, model and trainer.

    Args:
        name: `fit`, `validate`, `test` or `predict`.
        words: Those after it.
        cli: What runs it; None takes `BdcleanCLI`.
        again: The command that goes on with a fit; None makes it of these words.

    Raises:
        ConfigError: If words, config files or settings are wrong.
    """
    with stopping.importing():
        import_rooms()
    quieten()
    try:
        again = again or closing.command(name, closing.going_on(words))
        done = (cli or BdcleanCLI)(name, words, again)
    except Exception as error:
        refusal = None if behind(error, BdcleanError) else making.of_lightning(error)
        if refusal is None:
            raise
        raise ConfigError(refusal) from error
    if distributed.is_available() and distributed.is_initialized():
        # Gloo's threads should not outlive the interpreter; Lightning ends NCCL's group alone.
        distributed.destroy_process_group()
    return done


class BdcleanCLI(LightningCLI):
    """LightningCLI with a run folder, exact resume and links from data to model.

    Args:
        name: `fit`, `validate`, `test` or `predict`.
        words: Those after it.
        again: The command that goes on with a fit that was stopped.

    Attributes:
        save: Keeps the config of a fit.
    """

    save: ClassVar[type[SaveRunConfig]] = SaveRunConfig

    def __init__(self, name: str, words: Sequence[str], again: str = "") -> None:
        self.name, self.words, self.again = name, list(words), again
        with in_users_words(lambda: vars(self).get("config", {}).get(name)):
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_class=making.LightningParser,
                save_config_callback=None,  # it is among ours, before what reads its file
                args=[name, *words],
            )

    # ------------------------------------------------------------------ options

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """This command alone, which saves time, and without the table of `--verbose`."""
        return {self.name: LightningCLI.subcommands()[self.name] | {"verbose"}}

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
            target = f"model.init_args.facts.{fact}"
            parser.link_arguments(f"data.{fact}", target, apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it was written.

        Lightning reads hyper-parameters out of the file given as --ckpt_path and lets them
        override YAML and command line. Here that file only resumes or evaluates our own run,
        whose config is at hand.
        """

    def _set_seed(self) -> None:
        """As Lightning's, which sets the seed of numpy too; that takes 32 bits."""
        seed = self._get(self.config, "seed_everything")
        if seed is not None and not isinstance(seed, bool):
            check_between("seed_everything", seed, 0, 2**32 - 1)
        super()._set_seed()

    # ------------------------------------------------------------------ data, model and trainer

    def _add_instantiators(self) -> None:
        """Makes models without the argument `facts` too, which a user's own may be."""
        for make, kind in (
            (making.Maker(cli=self, key="model"), LightningModule),
            (making.Maker(cli=self, key="data"), LightningDataModule),
            (making.make_attack, Attack),
        ):
            self.parser.add_instantiator(make, kind, subclasses=True)

    def before_instantiate_classes(self) -> None:
        """Refuses a checkpoint that is not there."""
        plugins = self._get(self.config, "trainer", default={}).get("plugins")
        given, weights_only = (self._get(self.config, k) for k in ("ckpt_path", "weights_only"))
        local = run_place.are_lightnings(plugins)
        run_place.check_checkpoint(given, weights_only=weights_only, local=local)

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer.

        Raises:
            ConfigError: If one of them needs a package that is not there (a logger, a profiler),
                or takes no argument of a name that the config gives.
        """
        with self.told():
            super().instantiate_classes()

    @contextmanager
    def told(self) -> Iterator[None]:
        """What cannot be built is told in the words of the config."""
        config = making.untouched(self.config[self.name])
        try:
            yield
        except Exception as error:
            refused = making.refusal(error, config)
            if refused is None:
                raise
            raise refused from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, writing into the run folder, with whole checkpoints and plain progress."""
        config = self._get(self.config_init, "trainer", default={})
        run = self.run_folder
        if self._writes:
            require_files(run, self.name)
        plugins, theirs = (making.listed(config.get(key)) for key in ("plugins", "callbacks"))
        run_place.check_plugins(plugins, config.get("strategy"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = [*theirs, *self._own_callbacks(config), Monitors(theirs)]
        if config.get("enable_progress_bar") is None and not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = any(isinstance(c, ProgressBar) for c in callbacks)
        if config.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False
        if config.get("logger") in (None, True):
            # What a fit has logged stays where it is: others have records, or lines, of their own.
            kwargs["logger"] = MetricsLog(run) if self.name == "fit" else False
        # Lightning reads a requeued job's checkpoint there for any command that names none
        root = run.path if self.subcommand == "fit" else run.checkpoints
        kwargs |= {"default_root_dir": str(root), "plugins": plugins, "callbacks": callbacks}
        with trainer_settings.in_our_words(vars(config), run.path):
            trainer = super().instantiate_trainer(**kwargs)
        for saved in (each for each in callbacks if isinstance(each, SaveRunConfig)):
            saved.require_own(run.path)  # after all that is wrong with the command itself
        ranks.take_over(trainer)
        trainer_settings.advise(trainer)
        return trainer

    def _own_callbacks(self, config: Any) -> list[Callback]:
        run, callbacks = str(self.run_folder.path), list[Callback]()
        if self._writes and self.subcommand == "fit":
            saved = self.save(self._parser("fit"), self.config["fit"])
            callbacks += [saved, LambdaCallback(on_train_batch_end=lambda *_: require_held())]
        read = weights_files(self.config[self.name].as_dict())
        callbacks += [ExactResume(read), Requeue(run), RunRecord(run), Suspects(run)]
        callbacks.append(PredictionFiles(run))
        if self._get(self.config_init, "test_after_fit"):
            callbacks.append(ReadTestSet())
        theirs = any(isinstance(each, ProgressBar) for each in config.get("callbacks") or [])
        if not theirs and config.get("enable_progress_bar") is None:
            callbacks.append(StageBar() if sys.stderr.isatty() else ProgressLines())
        return callbacks

    @property
    def _writes(self) -> bool:
        return not self._get(self.config_init, "trainer", default={}).get("fast_dev_run")

    @property
    def run_folder(self) -> RunFolder:
        """Where this command writes: `--run`, or the folder of the run that is evaluated."""
        run, checkpoint = (self._get(self.config, key) for key in ("run", "ckpt_path"))
        return run_folder(self.name, run, checkpoint)

    # ------------------------------------------------------------------ running

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lets `last` mean the checkpoint of a requeued job as well, if that is the newer one.

        A job that was requeued goes on without being told.
        """
        words: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        run = self.run_folder
        if subcommand == "fit" and self._writes and run.of_requeues():
            words["ckpt_path"] = words.get("ckpt_path") or "last"
        if words.get("ckpt_path") == "last":
            words["ckpt_path"] = newest_checkpoint(subcommand, run)
        if words.get("ckpt_path") is not None:
            run_place.check_strategy(self.trainer.strategy)
        if subcommand in ("validate", "test"):
            words["verbose"] = False  # of its own table; see `after_test`
        return words

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command, which has the run folder for itself.

        Raises:
            Stopped: If a signal ended it; it says how to go on.
        """
        with (
            self._alone() as leave,
            ranks.ending_together(self.trainer, leave, self._how_to_go_on),
        ):
            named = not self._writes or "--run" in dict(values_in(self.words))
            if subcommand == "fit" and not named:
                self._say(f"No --run is given: this run writes into {self.run_folder.path}.")
            try:
                super()._run_subcommand(subcommand)
            except BaseException as error:
                stop = ranks.stop_behind(error)
                if stop is None:
                    damage = odd_state(error, named_checkpoint(self.trainer))
                    if damage is None:
                        raise
                    raise damage from error
                stop.told = self._how_to_go_on(stop.what)
                raise stop from None

    @contextmanager
    def _alone(self) -> Iterator[Callable[[], None]]:
        """Locks the run folder on the first process, and clears what killed ones left there.

        Gives what unlocks it early, for a process that ends at once.
        """
        if not self._writes or getattr(rank_zero_only, "rank", 0) != 0:
            yield lambda: None
            return
        run = self.run_folder
        with RunLock(run.path) as lock:
            sweep(run.path)
            sweep(run.checkpoints)
            require_writable(run)
            yield lock.give_back

    def after_fit(self) -> None:
        """Tests the final weights, which are in memory, unless told not to; says what was done."""
        if is_trial(self.trainer):
            self._say(closing.TRIAL)
        if is_trial(self.trainer) or self.trainer.interrupted:
            return
        tests = has_test_images(self.datamodule)
        wanted = self._get(self.config_init, "test_after_fit")
        untested = why_untested(self.model, self.datamodule, wanted=wanted)
        stays = self._recorder.stays and bool(untested or self._recorder.record["metrics"])
        stays = self.trainer.strategy.broadcast(stays)
        if untested is None and not stays:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            on = closing.unlimited(self.words, self._get(self.config_init, "trainer", default={}))
            record, folder = self._recorder.record, self.run_folder.path
            told = closing.after_fit(record, folder, on, untested, tests=tests, stays=stays)
            self._say(*told)

    def after_test(self) -> None:
        """Says what was measured."""
        if is_trial(self.trainer):
            self._say(closing.TRIAL)
        elif self.trainer.is_global_zero:
            record = self._recorder.record
            self._say(*closing.after_test(record, self.run_folder.path, self.words))

    def after_validate(self) -> None:
        """Says what was measured; nothing is written but the logger's files."""
        metrics = {
            key.removeprefix("val/"): float(value)
            for key, value in self.trainer.callback_metrics.items()
            if key.startswith("val/")
        }
        if isinstance(self.model, BackdoorModule):
            metrics |= self.model.evaluation_counts("val")
        attack = getattr(self.datamodule, "attack", None)
        name = None if attack is None else type(attack).__name__
        self._say(closing.measured(metrics, name, "held-out training"))
        if is_trial(self.trainer):
            self._say(closing.TRIAL)
        elif has_test_images(self.datamodule):
            self._say(f"Next: {closing.command('test', as_typed(self.words))}")

    @rank_zero_only
    def _say(self, *lines: str) -> None:
        print("\n".join(lines))

    @property
    def _recorder(self) -> RunRecord:
        callbacks = vars(self.trainer)["callbacks"]
        return next(each for each in callbacks if isinstance(each, RunRecord))

    def _how_to_go_on(self, what: str) -> str:
        if self.subcommand != "fit":
            return f"{what}; run the same command again."
        if self.run_folder.newest_checkpoint() is None:
            return f"{what}. Nothing is saved yet; run the same command again."
        return f"{what}. This goes on: {self.again}"


def _checkpoints(run: str) -> str:
    return f"{run}/checkpoints"
