"""The record of a run: what is in it, who writes it, and when."""

import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import LightningModule, Trainer, seed_everything

from bdclean.attacks import BadNets
from bdclean.backbones import load_model
from bdclean.callbacks import RunRecord
from bdclean.callbacks.writing import run_to_write
from bdclean.cli import main
from bdclean.data import Digits, Splits
from bdclean.files import sha256_of_file
from bdclean.runs import SCHEMA, RunFolder, cell_hash
from bdclean.training import Supervised

PARTS = [
    "schema",
    "metrics",
    "intervals",
    "definitions",
    "protocol",
    "data",
    "cost",
    "hashes",
    "seed",
    "versions",
]
pytestmark = pytest.mark.filterwarnings("ignore")


def trainer_of(folder, callbacks=None, **arguments):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_test_batches": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": [RunRecord(str(folder))] if callbacks is None else callbacks,
    }
    return Trainer(**(settings | arguments))


def made(attack=None):
    data = Digits(attack=attack, splits=Splits(defense=300, probe=100))
    return Supervised(data.facts, width=4, augmentation="none"), data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit that a test follows, with the config that the command line would have written."""
    folder = tmp_path_factory.mktemp("runs") / "new"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed_everything: 5\nrun: here\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        seed_everything(5, verbose=False)
        module, data = made(BadNets(target=6, rate=0.1))
        trainer = trainer_of(folder)
        trainer.fit(module, data)
        before = json.loads((folder / "result.json").read_text())
        trainer.test(module, datamodule=data, verbose=False)
    return SimpleNamespace(folder=RunFolder(folder), before=before, module=module, data=data)


def test_a_fit_writes_what_was_done(run):
    record = run.before
    assert list(record) == PARTS
    assert record["schema"] == SCHEMA == 1
    assert record["seed"] == 5
    assert record["metrics"] == {}
    assert record["protocol"]["method"] == "supervised"
    assert record["data"]["sizes"]["train"] == 1000
    assert (record["cost"]["steps"], record["cost"]["epochs"]) == (2, 1)
    assert record["cost"]["train_seconds"] > 0
    assert record["cost"]["peak_memory_mib"] > 0
    assert record["versions"]["torch"] == version("torch")


def test_its_hashes_are_those_of_the_files(run):
    hashes = run.before["hashes"]
    assert set(hashes) == {"config", "cell", "weights"}
    assert hashes["config"] == sha256_of_file(run.folder.config)
    assert hashes["weights"] == sha256_of_file(run.folder.weights)
    plan = run.before["data"]["plan_hash"]
    assert plan == run.data.plan.hash
    assert hashes["cell"] == cell_hash({"seed_everything": 5, "run": "anywhere"}, plan)


def test_it_leaves_the_product_the_plan_and_the_trigger(run):
    assert {file.name for file in run.folder.path.iterdir()} == {
        "config.yaml",
        "result.json",
        "model.safetensors",
        "plan.json",
        "plan.safetensors",
        "trigger.safetensors",
    }
    files = (run.folder.weights, run.folder.plan, run.folder.trigger)
    assert all(file.is_file() for file in files)
    saved, trained = load_model(run.folder.weights).state_dict(), run.module.model.state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_a_test_adds_what_was_measured_and_changes_nothing_else(run):
    record = run.folder.read_record()
    rates = {"acc", "asr", "asr_floor", "pa"}
    assert set(record["metrics"]) == rates | {"n_clean", "n_triggered"}
    assert set(record["intervals"]) == rates
    for key, (low, high) in record["intervals"].items():
        assert 0 <= low <= record["metrics"][key] <= high <= 100
        assert low < high
    assert record["cost"].pop("evaluation_seconds") > 0
    assert record | {"metrics": {}, "intervals": {}} == run.before


def test_a_test_alone_has_a_record_of_its_own(tmp_path, run):
    (tmp_path / "result.json").write_text("that of the fit")
    trainer_of(tmp_path).test(run.module, datamodule=run.data, verbose=False)
    record = json.loads((tmp_path / "test.json").read_text())
    assert list(record) == PARTS
    assert record["metrics"]["n_clean"] == run.folder.read_record()["metrics"]["n_clean"]
    assert record["hashes"] == {"config": None}
    assert record["cost"]["train_seconds"] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"result.json", "test.json"}
    assert (tmp_path / "result.json").read_text() == "that of the fit"


def test_without_a_config_there_is_no_cell(tmp_path):
    module, data = made()
    trainer_of(tmp_path / "run").fit(module, data)
    record = RunFolder(tmp_path / "run").read_record()
    assert record["hashes"]["config"] is None
    assert record["hashes"]["cell"] is None
    assert len(record["hashes"]["weights"]) == 64
    assert "plan_hash" not in record["data"]


def test_a_development_run_leaves_nothing(tmp_path):
    trainer_of(tmp_path, fast_dev_run=True).fit(*made())
    assert list(tmp_path.iterdir()) == []


def stub(**changes):
    facts = {"is_global_zero": True, "fast_dev_run": 0, "log_dir": None}
    return SimpleNamespace(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "writes"),
    [({}, True), ({"is_global_zero": False}, False), ({"fast_dev_run": 1}, False)],
)
def test_the_first_process_writes(tmp_path, changes, writes):
    run = run_to_write(stub(**changes), str(tmp_path))
    assert run == (RunFolder(tmp_path) if writes else None)


def test_the_folder_is_that_of_the_logger_if_none_is_given(tmp_path):
    logs = stub(log_dir=str(tmp_path / "logs"))
    assert run_to_write(logs, None) == RunFolder(tmp_path / "logs")
    assert run_to_write(logs, str(tmp_path)) == RunFolder(tmp_path)
    assert run_to_write(stub(), None) is None


def test_a_resumed_run_counts_the_seconds_of_both_parts(tmp_path):
    first = RunRecord(str(tmp_path))
    first.on_fit_start(stub(), LightningModule())
    first._started -= 100
    before = first.state_dict()["train_seconds"]
    assert before == pytest.approx(100, abs=5)
    module, data = made()
    second = RunRecord(str(tmp_path))
    second.load_state_dict({"train_seconds": before})
    trainer_of(tmp_path, callbacks=[second]).fit(module, data)
    seconds = json.loads((tmp_path / "result.json").read_text())["cost"]["train_seconds"]
    assert 100 < seconds < 160


def test_the_command_line_gives_one_experiment_one_cell(tmp_path):
    """In another folder, under another logger; another seed and another suspect are others."""
    quick = ["--trainer.limit_train_batches", "1", "--test_after_fit", "false"]
    names = ("trainer/cpu", "data/digits", "attack/badnets/cbd", "train/supervised/fast")
    words = [word for name in names for word in ("-c", name)]
    words += [*quick, "--model.width", "4", "--trainer.max_epochs", "1"]
    weights = str(tmp_path / "one" / "model.safetensors")
    runs = {
        "one": [],
        "two": ["--trainer.logger", "false", "--trainer.enable_model_summary", "false"],
        "seed": ["--seed_everything", "1"],
        "suspect": ["--model.weights", weights],
    }
    cells = {}
    for name, more in runs.items():
        main(["fit", *words, *more, "--run", str(tmp_path / name)])
        run = RunFolder(tmp_path / name)
        cells[name] = run.read_record()["hashes"]["cell"]
        assert cells[name] == run.cell(run.read_record()["data"]["plan_hash"])
        assert yaml.safe_load(run.config.read_text())["run"] == str(tmp_path / name)
    assert cells["one"] == cells["two"]
    assert len(set(cells.values())) == 3
