"""The files about suspicious samples, of real fits of a small defence on poisoned digits."""

import csv
import dataclasses
import json
import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.nn import functional as F

from bdclean.attacks import BadNets
from bdclean.callbacks import RunRecord, Suspects, suspects
from bdclean.cli import main
from bdclean.data import Digits, Splits
from bdclean.figures.suspects import draw_sheet
from bdclean.functional import tiers
from bdclean.metrics.identification import identification
from bdclean.modules import BackdoorModule, Recipe, Stage
from bdclean.printable import text_of_cell
from bdclean.runs import RunFolder
from bdclean.sifting import Sifter
from bdclean.tabular import read_csv
from bdclean.types import Findings, ImageFacts, TrainingSet

FILES = {"suspects.csv", "suspects.png", "scores.png", "rounds.png"}
CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore")


class Toy(Sifter):
    """Trains for an epoch, twice, and flags the fifth of the samples whose loss is lowest."""

    name = "toy"

    def __init__(self, facts: ImageFacts, width: int = 4):
        recipe = Recipe(epochs=1, lr=0.05, batch_size=40, augmentation="none")
        super().__init__(facts, recipe, width=width)

    @property
    def further_scores(self):
        return ("consistency",)

    def plan(self):
        fit = Stage("fit", self.recipe, reads=self.everything, step=self.fit_labels)
        return (fit, Stage("judge", begin=self.judge)) * 2

    def judge(self):
        logits, labels = self.logits_of_each(), self.labels_of_each()
        loss = F.cross_entropy(logits, labels, reduction="none")
        # few levels, so that there are ties
        self.results["score"] = -(4 * loss).round() / 4
        self.results["consistency"] = logits.softmax(1).amax(1)
        flagged = torch.zeros(len(labels), dtype=torch.bool)
        flagged[loss.argsort()[: len(labels) // 5]] = True
        best = logits.argmax(1)
        self.results["proposed"] = torch.where(flagged & (best != labels), best, -1)
        self.results["flagged"] = flagged
        self.close_round(flagged)


class Few(Digits):
    """160 digits of 16 pixels, whose truth may be told in another way or not at all."""

    input_size = 16

    def __init__(self, truth="told", **arguments):
        attack = BadNets(target=6, rate=0.1)
        splits = Splits(val=20)
        super().__init__(attack, splits, shuffle_seed=1, validate_in_fit=True, **arguments)
        self.truth = truth
        if truth == "shuffled":
            plan, overlay = self.plan, self.poisoned_set.overlay
            generator = torch.Generator().manual_seed(5)
            others = torch.randperm(plan.num_samples, generator=generator)
            others = others[: len(plan.poison_index)].sort().values
            assert not torch.equal(others, plan.poison_index)
            plan = dataclasses.replace(plan, poison_index=others)
            self.poisoned_set = dataclasses.replace(self.poisoned_set, plan=plan)
            # Images and labels stay as the plan has made them.
            vars(self.poisoned_set)["overlay"] = overlay

    def read_train(self):
        whole = super().read_train()
        return dataclasses.replace(
            whole,
            images=whole.images[:180, :, ::2, ::2].contiguous(),
            labels=whole.labels[:180],
            files=tuple(f'{k}, "{k % 7}"/ä.png' for k in range(180)),
        )

    def read_test(self):
        whole = super().read_test()
        images = whole.images[:20, :, ::2, ::2].contiguous()
        return dataclasses.replace(whole, images=images, labels=whole.labels[:20])

    def training_set(self):
        known = super().training_set()
        if self.truth == "absent":
            return dataclasses.replace(known, poisoned=None, covers=None)
        return known


@dataclasses.dataclass
class Run:
    folder: Path
    data: Few
    module: BackdoorModule

    @property
    def record(self):
        return json.loads((self.folder / "result.json").read_text())

    @property
    def lines(self):
        with (self.folder / "suspects.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def bytes(self, name):
        return (self.folder / name).read_bytes()


def fit(folder, data=None, **arguments):
    seed_everything(0, verbose=False)
    data = Few() if data is None else data
    module = Toy(data.facts)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": CSVLogger(folder, name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "reload_dataloaders_every_n_epochs": 1,
        "callbacks": [RunRecord(), Suspects()],
    }
    Trainer(**(settings | arguments)).fit(module, data)
    return Run(Path(folder), data, module)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    names = ("told", "shuffled", "absent")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        return {name: fit(folder / name, Few(name)) for name in names}


@pytest.fixture(scope="module")
def run(runs):
    return runs["told"]


# ---------------------------------------------------------------------- the fit


def test_a_fit_leaves_all_files_and_no_other(run):
    present = {path.name for path in run.folder.iterdir()}
    assert present >= FILES | {"result.json", "model.safetensors", "metrics.csv"}
    assert not [name for name in present if name.startswith(".")]
    for name in FILES - {"suspects.csv"}:
        assert Image.open(run.folder / name).width > 500


def test_each_line_tells_what_was_found_of_one_sample(run):
    found, known = run.module.findings(), run.data.training_set()
    assert len(run.lines) == 160
    assert sorted(int(line["index"]) for line in run.lines) == list(range(160))
    for line in run.lines:
        row = int(line["index"])
        assert line["file"] == known.files[row]
        assert int(line["label"]) == known.labels[row]
        assert np.float32(line["score"]) == found.score[row].numpy()
        assert line["flagged"] == str(int(found.flagged[row]))
        other = int(found.proposed[row])
        assert line["proposed"] == ("" if other < 0 else str(other))
    assert 0 < sum(line["proposed"] != "" for line in run.lines) < 160
    assert sum(line["flagged"] == "1" for line in run.lines) == 32


def test_lines_are_in_order_of_suspicion_and_ties_in_that_of_rows(run):
    keys = [(-float(line["score"]), int(line["index"])) for line in run.lines]
    assert keys == sorted(keys)
    assert len({score for score, _ in keys}) < 100  # there are ties


def test_the_record_says_how_well_the_poison_was_found(run):
    record = run.record["identification"]
    assert record == identification(run.module.findings(), run.data.training_set())
    assert (record["n"], record["n_poisoned"], record["n_flagged"]) == (160, 16, 32)
    assert len(record["rounds"]) == 2
    assert set(record["further"]) == {"consistency"}


def test_the_record_counts_only_where_the_truth_is_unknown(runs):
    record = runs["absent"].record["identification"]
    assert record.keys() == {"n", "n_flagged", "rounds"}
    assert (record["n"], record["n_flagged"], len(record["rounds"])) == (160, 32, 2)
    assert all(part.keys() == {"n_flagged"} for part in record["rounds"])


def test_nothing_but_what_shows_the_truth_depends_on_it(runs):
    told = runs["told"]
    for name in ("shuffled", "absent"):
        other = runs[name]
        for file in ("suspects.csv", "suspects.png", "metrics.csv"):
            assert other.bytes(file) == told.bytes(file), (name, file)
        assert other.record["hashes"]["weights"] == told.record["hashes"]["weights"]
        # these are the parts that show it
        assert other.bytes("scores.png") != told.bytes("scores.png")
        assert other.bytes("rounds.png") != told.bytes("rounds.png")
        assert other.record["identification"] != told.record["identification"]


def test_writing_again_gives_the_same_bytes(run, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(run.bytes("metrics.csv"))  # complete by now
    suspects._write_files(RunFolder(tmp_path), run.module.findings(), run.data)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == run.bytes(name)


def test_validation_is_read_from_the_log_of_the_run(run):
    read = suspects.evaluations(RunFolder(run.folder))
    assert {key: sorted(course) for key, course in read.items()} == {
        "val/acc": [0, 1],
        "val/asr": [0, 1],
    }


# ---------------------------------------------------------------------- what leaves no file


class Judged(BackdoorModule):
    def findings(self):
        return made([3.0, 2.0, 1.0])


def stub(**changes):
    """What the callback asks of a Trainer."""
    facts = {"log_dir": None, "datamodule": Plain(), "is_global_zero": True}
    return SimpleNamespace(**(facts | {"fast_dev_run": 0} | changes))


@pytest.mark.parametrize(
    ("change", "module", "works"),
    [
        ({}, Judged(), True),
        ({}, BackdoorModule(), False),
        ({}, LightningModule(), False),
        ({"is_global_zero": False}, Judged(), False),
        ({"fast_dev_run": 1}, Judged(), False),
        ({"datamodule": object()}, Judged(), False),
        ({"datamodule": None}, Judged(), False),
    ],
)
def test_it_works_or_does_nothing(tmp_path, change, module, works):
    Suspects(str(tmp_path / "run")).on_fit_end(stub(**change), module)
    assert (tmp_path / "run").exists() == works


def test_without_a_folder_it_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Suspects().on_fit_end(stub(), Judged())
    assert not any(tmp_path.iterdir())


def test_a_development_run_leaves_nothing(tmp_path):
    callbacks = [RunRecord(str(tmp_path)), Suspects(str(tmp_path))]
    run = fit(tmp_path, max_epochs=None, fast_dev_run=True, callbacks=callbacks)
    assert run.module.findings() is not None
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- parts


def made(score, flagged=None, proposed=None, rounds=0):
    size = len(score)
    flagged = torch.zeros(size, dtype=torch.bool) if flagged is None else torch.tensor(flagged)
    proposed = torch.full((size,), -1) if proposed is None else torch.tensor(proposed)
    empty = torch.zeros(rounds, size, dtype=torch.bool)
    return Findings(torch.tensor(score), flagged, proposed, {}, empty, torch.arange(rounds))


def test_the_table_quotes_and_leaves_empty_what_is_not_there():
    files = ("a.png", 'x, "y"\n.png', "\udce9.png")
    found = made([0.1, 1 / 3, -2.0], [False, True, False], [-1, 0, -1])
    text = suspects.table(found, TrainingSet(torch.tensor([4, 5, 6]), files, None, None))
    header, *lines = csv.reader(StringIO(text))
    assert tuple(header) == ("index", "file", "label", "score", "flagged", "proposed", "tier")
    assert lines == [
        ["1", 'x, "y"\n.png', "5", "0.333333343", "1", "0", "possible"],
        ["0", "a.png", "4", "0.100000001", "0", "", ""],
        ["2", "\udce9.png", "6", "-2", "0", "", ""],
    ]
    text = suspects.table(found, TrainingSet(torch.tensor([4, 5, 6]), (), None, None))
    assert text.splitlines()[2] == "0,,4,0.100000001,0,,"
    scored = dataclasses.replace(found, flagged=None)
    text = suspects.table(scored, TrainingSet(torch.tensor([4, 5, 6]), (), None, None))
    assert text.splitlines()[2] == "0,,4,0.100000001,,,"


def test_the_table_holds_no_formula_and_no_control_character():
    files = ("=cmd|' /C calc'!A0/a.png", "ok/-1.png", "\x1b[31m/c.png")
    found = made([3.0, 2.0, -1.0], [True, False, False], [1, -1, -1])
    names = ("=cmd|' /C calc'!A0", "-1")
    data = TrainingSet(torch.tensor([0, 1, 0]), files, None, None, names)
    _, *lines = csv.reader(StringIO(suspects.table(found, data)))
    assert [line[1] for line in lines] == [f"'{files[0]}", files[1], "\\x1b[31m/c.png"]
    assert [text_of_cell(line[1]) for line in lines[:2]] == list(files[:2])
    assert lines[0][-2:] == [f"'{names[0]}", "'-1"]
    assert lines[2][3] == "-1"  # a number


def test_the_table_names_the_classes_that_have_names():
    found = made([3.0, 2.0, 1.0], [True, True, False], [2, 0, -1])
    names = ("bird", 'a "cat", grey', "\udce9")
    data = TrainingSet(torch.tensor([1, 2, 0]), (), None, None, names)
    header, *lines = csv.reader(StringIO(suspects.table(found, data)))
    assert header[7:] == ["label_name", "proposed_name"]
    assert [line[2] + line[5] for line in lines] == ["12", "20", "0"]
    assert [line[7:] for line in lines] == [
        ['a "cat", grey', "\udce9"],
        ["\udce9", "bird"],
        ["bird", ""],
    ]


class Plain:
    """Three samples of which nothing is known, with a file name that is not UTF-8."""

    def training_set(self):
        return TrainingSet(torch.arange(3), ("a", "\udce9", "c"), None, None)

    def training_images(self, rows):
        return rows[:, None, None, None].expand(-1, 3, 8, 8).byte()


def test_without_rounds_and_evaluations_there_is_no_picture_of_them(tmp_path):
    suspects._write_files(RunFolder(tmp_path), made([1.0, 2.0, 3.0]), Plain())
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"rounds.png"}
    assert b"\n1,\xe9,1,2,0,,\n" in (tmp_path / "suspects.csv").read_bytes()


def test_pictures_captions_and_flags_are_in_the_order_of_the_table(tmp_path, monkeypatch):
    drawn = []

    def keep(*arguments):
        drawn.append(arguments)
        return draw_sheet(*arguments)

    monkeypatch.setattr(suspects, "draw_sheet", keep)
    monkeypatch.setattr(suspects, "NUM_PICTURES", 2)
    found = made([2.0, 1.0, 3.0], [False, True, True], [-1, 7, 0])
    suspects._write_files(RunFolder(tmp_path), found, Plain())
    ((images, captions, told, heading),) = drawn
    assert images[:, 0, 0, 0].tolist() == [2, 0]
    assert captions == ["2 → 0", "0"]
    assert told.tolist() == [1, 0]
    assert heading == "The 2 most suspicious of 3 samples"


def test_the_likely_come_first(tmp_path, monkeypatch):
    """As many of one class are named otherwise, as each of three others."""
    monkeypatch.setattr(tiers, "FEWEST", 12)
    monkeypatch.setattr(tiers, "FEWEST_CLASSES", 5)
    drawn = []
    monkeypatch.setattr(suspects, "draw_sheet", lambda *given: drawn.append(given))
    monkeypatch.setattr(suspects, "save_png", lambda *given: None)
    labels = torch.arange(5).repeat_interleave(40)
    named = torch.full((200,), -1)
    named[:16] = torch.arange(16) % 4 + 1
    named[40] = 1
    found = made(torch.arange(200.0).tolist(), (named >= 0).tolist(), named.tolist())
    data = SimpleNamespace(
        training_set=lambda: TrainingSet(labels, (), None, None),
        training_images=lambda rows: rows[:, None, None, None].expand(-1, 3, 8, 8).byte(),
    )
    suspects._write_files(RunFolder(tmp_path), found, data)
    lines = read_csv(tmp_path / "suspects.csv")
    assert [line["tier"] for line in lines].count("possible") == 1
    assert [line["tier"] for line in lines[:17]] == ["likely"] * 16 + [""]
    assert [line["index"] for line in lines[:17]] == [*map(str, range(15, -1, -1)), "199"]
    ((images, _, told, _),) = drawn
    assert images[:17, 0, 0, 0].tolist() == [*range(15, -1, -1), 199]
    assert told[:17].tolist() == [2] * 16 + [0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "score", [[math.nan] * 3, [1.0] * 3, [math.inf, -math.inf, 0.0], [3e38, -3e38, 0.0]]
)
def test_odd_scores_are_drawn(tmp_path, score):
    suspects._write_files(RunFolder(tmp_path), made(score, rounds=1), Plain())
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_further_score_that_equals_the_score_is_drawn_once(tmp_path, monkeypatch):
    """As AdvrBD's when it only scores."""
    found, drawn = made([1.0, 2.0, 3.0]), []
    further = {"same": found.score.clone(), "other": found.score + 1}
    draw = suspects.draw_scores
    monkeypatch.setattr(
        suspects,
        "draw_scores",
        lambda scores, groups: drawn.append([*scores]) or draw(scores, groups),
    )
    suspects._write_files(RunFolder(tmp_path), dataclasses.replace(found, further=further), Plain())
    assert drawn == [["score", "other"]]


def test_samples_are_grouped_by_truth_or_else_by_flags():
    found = made([1.0, 2.0, 3.0], [False, True, True])
    labels = torch.zeros(3).long()
    poisoned, covers = torch.tensor([False, False, True]), torch.tensor([True, False, False])

    def names(truth, covers):
        groups = suspects._groups(found, TrainingSet(labels, (), truth, covers))
        return {name: mask.tolist() for name, mask in groups.items()}

    assert names(None, None) == {"not flagged": [1, 0, 0], "flagged": [0, 1, 1]}
    assert names(poisoned, covers) == {
        "clean": [0, 1, 0],
        "cover": [1, 0, 0],
        "poisoned": [0, 0, 1],
    }
    assert names(poisoned, None) == {"clean": [1, 1, 0], "poisoned": [0, 0, 1]}
    found = dataclasses.replace(found, flagged=None)
    assert names(None, None) == {"all": [1, 1, 1]}
    assert names(poisoned, None) == {"clean": [1, 1, 0], "poisoned": [0, 0, 1]}


def test_rounds_show_rates_only_where_the_truth_is_known():
    found = dataclasses.replace(
        made([1.0] * 4),
        rounds=torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
        round_epochs=torch.tensor([7, 9]),
    )
    labels, truth = torch.zeros(4).long(), torch.tensor([True, False, False, False])
    told = suspects._rounds(found, TrainingSet(labels, (), truth, None), {})
    assert told == {
        "flagged": {0: 75, 1: 25},
        "TPR": {0: 100, 1: 100},
        "FPR": {0: pytest.approx(200 / 3), 1: 0},
    }
    untold = suspects._rounds(found, TrainingSet(labels, (), None, None), {})
    assert untold == {"flagged": told["flagged"]}
    evaluated = {"val/acc": {6: 90.0, 7: 80.0, 8: 60.0, 9: 40.0}, "val/asr": {8: 1.0}}
    shown = suspects._rounds(found, TrainingSet(labels, (), None, None), evaluated)
    assert shown == {"flagged": told["flagged"], "val/acc": {0: 80, 1: 40}}


# ---------------------------------------------------------------------- the command line


def test_the_command_line_writes_them(tmp_path):
    files = ("trainer/cpu", "data/digits", "attack/badnets/cbd")
    words = [word for name in files for word in ("-c", str(CONFIGS / f"{name}.yaml"))]
    words += ["--model", f"{__name__}.Toy", "--run", str(tmp_path / "run")]
    words += ["--data.splits.defense", "1000", "--trainer.reload_dataloaders_every_n_epochs", "1"]
    main(["fit", *words])
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["identification"]["n"] == record["data"]["sizes"]["train"] == 300
    assert record["metrics"]["n_clean"] == 397
