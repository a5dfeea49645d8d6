"""`bdclean demo`: a backdoored model and its purification, on data that ships with scikit-learn.

A ResNet-18 learns digits of which some carry a BadNets patch. CBD and BCU then purify it with
clean unlabelled images. CBD leaves no classifier, so its result is measured with a linear probe,
and so is the victim once more: each purified row has a row before it under the same kind of head.
"""

import json
import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt
from lightning import seed_everything
from rich.console import Console

from bdclean import stopping
from bdclean.backbones import save_model
from bdclean.commands.attack_preview import preview
from bdclean.commands.demo_stages import (
    DemoSettings,
    fit,
    make_bcu,
    make_cbd,
    make_data,
    make_probe,
    make_trainer,
    make_victim,
    measure,
)
from bdclean.commands.parsing import Parser
from bdclean.commands.quiet import WARNINGS
from bdclean.commands.run_place import run_folder
from bdclean.errors import ConfigError
from bdclean.figures import triggers
from bdclean.figures.features import FeatureMap, feature_map, plot_features
from bdclean.figures.png import to_png
from bdclean.files import safetensors_metadata
from bdclean.locks import RunLock
from bdclean.modules import BackdoorModule
from bdclean.reporting import page
from bdclean.reporting.page import Picture, Row
from bdclean.runs import RunFolder

NEXT = (
    "bdclean fit -c trainer/cpu -c data/digits -c attack/badnets/digits "
    "-c train/supervised/digits --model.width 16 --run runs/victim"
)
"""The same victim, trained from configs."""
LARGEST_SEED = 2**32 - 1
RESULTS, REPORT = "results.json", "report.html"
MODELS = ("victim", "cbd", "bcu")
"""The weights that a demo writes, in their order."""
_MARK, _MARKED = "command", "bdclean demo"  # in the metadata of these files
NUM_SAMPLES = 6  # images that show the trigger
_QUIET_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_GPU = r"GPU available but not used"  # the demo is made for the CPU


class Demo:
    """One run of the demo.

    Args:
        out: Folder for the weights, results.json and report.html; made if it is missing.
        seed: Of the split, the poisoned rows, the training and the re-drawn weights.
        settings: What is trained, and for how long.
    """

    def __init__(self, out: Path, seed: int = 0, settings: DemoSettings | None = None) -> None:
        self.out, self.seed = out, seed
        self.settings = settings or DemoSettings()
        self.data = make_data(self.settings, seed)
        self.rows: list[Row] = []
        self._modules: dict[str, BackdoorModule] = {}

    def run(self) -> list[Row]:
        """Trains, measures and writes everything; returns the rows of the table.

        Raises:
            ConfigError: If the folder cannot be written.
        """
        self.train()
        with quiet(), one_thread():
            page.write_json(self.out / RESULTS, self.rows)
            self._write_report()
        return self.rows

    def train(self) -> list[Row]:
        """Trains and measures the models and writes their weights; returns the rows.

        Raises:
            ConfigError: If the folder cannot be written.
        """
        self._refuse_others()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for file in self.files():  # of an earlier run; what stands there belongs together
                file.unlink()
        except OSError as error:
            raise ConfigError(
                f"--run={self.out}: the folder cannot be written ({error.strerror or error})."
            ) from error
        self.rows = []
        with quiet(), one_thread():
            seed_everything(self.seed, verbose=False)
            self._stages()
        return self.rows

    def files(self) -> list[Path]:
        """What a demo has left in the folder."""
        names = (*map(self._weights, MODELS), self.out / RESULTS, self.out / REPORT)
        return [file for file in names if file.exists() or file.is_symlink()]

    def _refuse_others(self) -> None:
        """Refuses a folder in which something else would be lost."""
        if RunFolder(self.out).is_run:
            raise ConfigError(f"--run={self.out}: it holds a run of bdclean fit; name another one.")
        for file in filter(Path.is_file, map(self._weights, MODELS)):
            if safetensors_metadata(file).get(_MARK) != _MARKED:
                raise ConfigError(
                    f"--run={self.out}: its {file.name} is not of a demo, which would write over "
                    "it; name another folder."
                )

    def _stages(self) -> None:
        s, data, suspect = self.settings, self.data, self._weights("victim")
        train = len(data.rows.train)
        poisoned = 0 if data.plan is None else len(data.plan.poison_index)
        self._stage(
            "victim",
            f"a ResNet-18 of width {s.width} learns {train:,} digits, {poisoned} of them poisoned",
            make_victim(s, data),
            f"{train:,} ({poisoned} poisoned)",
            epochs=s.victim_epochs,
            save="victim",
        )
        self._stage(
            "victim + probe",
            f"the victim gets a new head from {s.num_probe} clean labelled digits",
            make_probe(s, data, suspect),
            f"{s.num_probe} for probe",
        )
        self._stage(
            "CBD + probe",
            f"purifies the victim with {s.num_defense} unlabelled digits, then the same probe",
            make_cbd(s, data, suspect),
            f"none + {s.num_probe} for probe",
            save="cbd",
        )
        self._stage(
            "BCU",
            f"purifies the victim with {s.num_defense} unlabelled digits",
            make_bcu(s, data, suspect, self.seed),
            "none",
            save="bcu",
        )

    def _stage(
        self,
        method: str,
        does: str,
        module: BackdoorModule,
        labels: str,
        epochs: int = -1,
        save: str | None = None,
    ) -> None:
        """Fits, saves and measures one module, and adds its row."""
        say(f"{method}: {does}")
        seconds = fit(module, self.data, epochs)
        if save is not None:
            made_by = {"made_by": json.dumps(module.protocol()), _MARK: _MARKED}
            save_model(module.product(), self._weights(save), made_by)
        scores = measure(module, self.data)
        self.rows.append(Row(method, labels, **asdict(scores), seconds=round(seconds, 1)))
        self._modules[method] = module
        say(f"{method}: took {seconds:.1f} s")

    def _weights(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"

    def _write_report(self) -> None:
        say("report: draws the features of all three models by t-SNE")
        maps = [
            self._map(title, self._modules[method])
            for method, title in (("victim", "victim"), ("CBD + probe", "CBD"), ("BCU", "BCU"))
        ]
        pictures = (
            Picture(
                "The trigger",
                "Test images as they are, with the patch in the lower right corner, and the "
                "absolute difference.",
                to_png(triggers.draw([preview("BadNets", self.data, NUM_SAMPLES)], amplify=1)),
            ),
            Picture(
                "Features before and after purification",
                "t-SNE of the backbone's features of all test images, one map per model. Colours "
                "are classes; the attack's target is class 0. Distances between two maps mean "
                "nothing.",
                to_png(plot_features(maps)),
            ),
        )
        libraries = {name: version(name) for name in ("bdclean", "torch", "lightning")}
        facts = {
            "seed": self.seed,
            "settings": asdict(self.settings),
            "data": self.data.describe(),
            "versions": libraries | {"python": platform.python_version()},
        }
        introduction = (
            "A classifier of scikit-learn's digits learned a backdoor (BadNets); CBD and BCU "
            "purified it with clean images and without their labels."
        )
        settings = json.dumps(facts, indent=2)
        page.write_html(
            self.out / REPORT, "bdclean demo", introduction, self.rows, pictures, settings
        )

    def _map(self, title: str, module: BackdoorModule) -> FeatureMap:
        """The features of all clean and triggered test images."""
        loaders = make_trainer().predict(module, datamodule=self.data) or []
        clean, triggered = (torch.cat([b["features"] for b in batches]) for batches in loaders)
        labels = self.data.test_set.labels
        assert labels is not None  # noqa: S101  (digits have labels)
        features = {"clean": clean, "triggered": triggered}
        iterations = self.settings.tsne_iterations
        return feature_map(title, features, labels, self.seed, iterations=iterations)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch on one thread.

    More gain nothing on networks as small as these, lose much on a busy machine, and sum in
    another order: the numbers would depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what Lightning says about settings that are meant as they are."""
    loggers = [logging.getLogger(name) for name in _QUIET_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for text in (*WARNINGS, _GPU):
            warnings.filterwarnings("ignore", message=text)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def say(line: str) -> None:
    """Prints a line beside the progress, so that standard output holds the table alone."""
    print(line, file=sys.stderr, flush=True)


def run_demo(args: Sequence[str]) -> None:
    """The command: `bdclean demo [--run DIR] [--seed N]`.

    Args:
        args: The words after `bdclean demo`.

    Raises:
        ConfigError: If the words are wrong, or the folder cannot be written.
        Stopped: If a signal ended it; it says what stays.
    """
    parser = Parser(
        prog="bdclean demo",
        description="Plants a backdoor in a small model and removes it, in minutes on two cores.",
        renamed={"--out": "--run"},
        usage="bdclean demo [options]",
        example="bdclean demo --run runs/demo",
        more="docs/how_to/demo.md",
    )
    add = parser.add_argument
    add("--run", metavar="FOLDER", type=str, default="runs/demo", help="Folder to write into.")
    add("--seed", metavar="N", type=NonNegativeInt, default=0, help="Of all that is drawn.")
    chosen = parser.parse_args(args)
    if chosen.seed > LARGEST_SEED:
        raise ConfigError(f"--seed={chosen.seed}: it must be at most {LARGEST_SEED}.")
    demo = Demo(run_folder("demo", chosen.run, None).path, chosen.seed)
    with RunLock(demo.out):
        rows = _run(demo)
    console = Console(soft_wrap=False)
    console.print(page.table(rows))
    console.print(page.note(rows), soft_wrap=True)
    console.print(f"Written to {chosen.run}: the three models, {RESULTS}, {REPORT}", soft_wrap=True)
    console.print(f"Look at {Path(chosen.run) / REPORT} in a browser.", soft_wrap=True)
    console.print(f"Next: {NEXT}", soft_wrap=True)


def _run(demo: Demo) -> list[Row]:
    """Runs a demo; Lightning makes an exit of status 1 of the signal that ends it."""
    try:
        return demo.run()
    except BaseException as error:
        stop = stopping.received()
        if stop is None:
            raise
        kept = ", ".join(file.name for file in demo.files())
        stays = f"{demo.out} keeps {kept}" if kept else "Nothing is saved yet"
        told = f"stopped. {stays}; run the same command again, which begins anew."
        raise stopping.Stopped(stop.signum, told) from error
