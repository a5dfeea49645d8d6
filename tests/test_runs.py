"""The run folder: what lies where in it, and which experiment it is."""

import json
import os
from copy import deepcopy

import pytest
import torch
import yaml

from bdclean.attacks import BadNets
from bdclean.data import Digits
from bdclean.errors import ConfigError, DataError
from bdclean.files import FORMAT_KEY
from bdclean.runs import SCHEMA, RunFolder, canonical, cell_hash, read_record
from bdclean.tabular import read_csv
from bdclean.weights import write as write_weights

CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "strategy": "auto",
        "devices": 1,
        "num_nodes": 1,
        "precision": "bf16-mixed",
        "logger": None,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "here", "monitor": "val/acc"},
            }
        ],
        "max_epochs": 8,
        "log_every_n_steps": None,
        "enable_checkpointing": None,
        "enable_progress_bar": None,
        "enable_model_summary": None,
        "profiler": None,
        "plugins": None,
        "default_root_dir": None,
    },
    "model": {
        "class_path": "bdclean.purification.CBD",
        "init_args": {
            "weights": "WEIGHTS",
            "recipe": {"lr": 0.02, "epochs": 4},
            "milestones": [0.5, 0.75],
        },
    },
    "data": {
        "class_path": "bdclean.data.CIFAR10",
        "init_args": {
            "root": "data",
            "download": False,
            "cache": True,
            "attack": {"class_path": "bdclean.attacks.BadNets", "init_args": {"rate": 0.1}},
        },
    },
    "run": "runs/one",
    "test_after_fit": True,
    "checkpoint": {"filename": "last", "monitor": None},
    "ckpt_path": None,
    "weights_only": None,
}


@pytest.fixture
def config(tmp_path):
    weights = tmp_path / "suspect.safetensors"
    weights.write_bytes(b"suspect")
    made = deepcopy(CONFIG)
    made["model"]["init_args"]["weights"] = str(weights)
    return made


def changed(config, key, value):
    """A copy, in which one value is another."""
    made = deepcopy(config)
    *path, last = key.split(".")
    place = made
    for name in path:
        place = place[int(name)] if name.isdecimal() else place[name]
    place[last] = value
    return made


# ---------------------------------------------------------------------- the cell

SAME = {
    "run": "elsewhere/two",
    "checkpoint.monitor": "val/asr",
    "ckpt_path": "last",
    "weights_only": True,
    "trainer.accelerator": "gpu",
    "trainer.devices": 4,
    "trainer.num_nodes": 2,
    "trainer.strategy": "ddp",
    "trainer.plugins": ["SLURMEnvironment"],
    "trainer.logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"},
    "trainer.log_every_n_steps": 10,
    "trainer.profiler": "simple",
    "trainer.default_root_dir": "/scratch",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.enable_checkpointing": True,
    "trainer.callbacks.0.init_args.dirpath": "there",
    "data.init_args.download": True,
    "data.init_args.cache": False,
}
OTHER = {
    "seed_everything": 1,
    "trainer.precision": "32-true",
    "trainer.max_epochs": 9,
    "trainer.callbacks.0.init_args.monitor": "val/asr",
    "trainer.callbacks": None,
    "model.class_path": "bdclean.purification.BCU",
    "model.init_args.recipe.lr": 0.03,
    "model.init_args.milestones": [0.75, 0.5],
    "model.init_args.weights": None,
    "data.init_args.root": "other",
    "data.init_args.attack.init_args.rate": 0.2,
    "data.init_args.attack": None,
    "test_after_fit": False,
}


@pytest.mark.parametrize("key", SAME)
def test_where_and_on_what_it_runs_is_the_same_experiment(config, key):
    other = changed(config, key, SAME[key])
    assert other != config
    assert cell_hash(other, "plan") == cell_hash(config, "plan")


@pytest.mark.parametrize("key", OTHER)
def test_another_value_is_another_experiment(config, key):
    other = changed(config, key, OTHER[key])
    assert cell_hash(other, "plan") != cell_hash(config, "plan")


def test_another_plan_is_another_experiment(config):
    assert len({cell_hash(config, plan) for plan in ("one", "two", None)}) == 3


def test_a_suspect_is_its_content_and_not_its_place(config, tmp_path):
    before = cell_hash(config, None)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(b"suspect")
    assert cell_hash(changed(config, "model.init_args.weights", str(moved)), None) == before
    moved.write_bytes(b"another")
    other = changed(config, "model.init_args.weights", str(moved))
    assert cell_hash(other, None) != before
    moved.unlink()
    with pytest.raises(FileNotFoundError):
        cell_hash(other, None)


def test_what_our_weights_file_says_itself_may_be_said_again(config, tmp_path):
    file, key = str(tmp_path / "ours.safetensors"), "model.init_args.weights"
    network = {"arch": "resnet18", "width": 8, "stem": "cifar"}
    said = deepcopy(config)
    said["model"]["init_args"] |= network
    tensor = {"weight": torch.zeros(1)}
    for metadata, same in (
        ({FORMAT_KEY: "1"}, True),
        ({"made_by": "somebody"}, False),
        ({}, False),
    ):
        write_weights(tensor, file, metadata)
        cells = {cell_hash(changed(each, key, file), None) for each in (config, said)}
        assert (len(cells) == 1) is same
    other = deepcopy(said)
    said["model"]["init_args"]["weights"] = None
    other["model"]["init_args"] |= {"weights": None, "width": 16}
    assert cell_hash(said, None) != cell_hash(other, None)  # a network that is made anew


def test_files_of_attacks_are_their_content_too(config, tmp_path):
    surrogate = tmp_path / "surrogate.pth"
    key = "data.init_args.attack.init_args.surrogate"
    cells = set()
    for content in (b"one", b"two", b"one"):
        surrogate.write_bytes(content)
        cells.add(cell_hash(changed(config, key, str(surrogate)), None))
    assert len(cells) == 2


def test_the_order_of_the_keys_says_nothing(config):
    other = {key: config[key] for key in reversed(config)}
    assert cell_hash(other, None) == cell_hash(config, None)


def test_the_config_stays_as_it_is(config):
    before = deepcopy(config)
    kept = canonical(config)
    assert config == before
    assert set(kept) == {"seed_everything", "trainer", "model", "data", "test_after_fit"}
    assert set(kept["trainer"]) == {"precision", "callbacks", "max_epochs"}


def test_the_hash_stays(config):
    """Records are recognised by it: whoever changes it, makes all finished runs run again."""
    config["model"]["init_args"]["weights"] = None
    expected = "95720ede11c39be7ee15a4b6841bb8fc7766d8e3bc8f267d3c578469a4c3711f"
    assert cell_hash(config, "plan") == expected


def write(run, config, name="config.yaml"):
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / name).write_text(yaml.safe_dump(config))


def test_the_cell_of_a_run(config, tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.cell("plan") is None  # without a config
    write(run, config)
    assert run.cell("plan") == cell_hash(config, "plan")
    write(run, changed(config, "trainer.devices", 2), "config.1.yaml")  # resumed on two devices
    assert run.cell("plan") == cell_hash(config, "plan")
    write(run, changed(config, "trainer.max_epochs", 9), "config.2.yaml")  # and for longer
    assert run.cell("plan") is None
    (run.path / "config.2.yaml").unlink()
    (tmp_path / "suspect.safetensors").unlink()
    assert run.cell("plan") is None


# ---------------------------------------------------------------------- what lies where


def test_the_run_of_a_checkpoint(tmp_path, config):
    run = RunFolder(tmp_path / "run")
    assert RunFolder.of_checkpoint(run.last_checkpoint) is None
    write(run, config)
    run.checkpoints.mkdir()
    for file in (run.last_checkpoint, run.path / "hpc_ckpt_1.ckpt"):
        assert RunFolder.of_checkpoint(file) is None
        file.write_bytes(b"")
        assert RunFolder.of_checkpoint(file) == run
        assert RunFolder.of_checkpoint(str(file)) == run
    assert RunFolder.of_checkpoint(run.checkpoints / "deeper" / "last.ckpt") is None


@pytest.mark.parametrize("given", ["last", "best", "hpc", "no.ckpt", "x" * 300, "http://a/b.ckpt"])
def test_what_is_no_checkpoint_file_is_of_no_run(tmp_path, monkeypatch, given):
    here = tmp_path / "here"
    for folder in (tmp_path, here):  # configs of something else
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("batch: 3\n")
    (here / "last").write_text("a file of that name")
    monkeypatch.chdir(here)
    assert RunFolder.of_checkpoint(given) is None


def test_a_moved_run_is_the_same(tmp_path, config, monkeypatch):
    run = RunFolder(tmp_path / "run")
    write(run, config)
    run.checkpoints.mkdir()
    run.last_checkpoint.write_bytes(b"")
    run.record.write_text('{"schema": 1}')
    before = run.cell(None)
    moved = RunFolder(run.path.rename(tmp_path / "moved"))
    assert moved.newest_checkpoint() == tmp_path / "moved" / "checkpoints" / "last.ckpt"
    assert RunFolder.of_checkpoint(moved.last_checkpoint) == moved
    assert moved.cell(None) == before
    assert moved.is_finished
    monkeypatch.chdir(tmp_path)
    assert RunFolder.of_checkpoint("moved/checkpoints/last.ckpt") == moved


def test_the_newest_checkpoint_may_be_that_of_a_requeued_job(tmp_path):
    run = RunFolder(tmp_path)
    assert run.newest_checkpoint() is None
    run.checkpoints.mkdir()
    places = (run.last_checkpoint, tmp_path / "hpc_ckpt_1.ckpt", tmp_path / "hpc_ckpt_2.ckpt")
    for time, file in enumerate(places, 1):
        file.write_bytes(b"")
        os.utime(file, (time, time))
        assert run.newest_checkpoint() == file
    os.utime(run.last_checkpoint, (9, 9))
    assert run.newest_checkpoint() == run.last_checkpoint


def test_configs_and_logs_are_in_order(tmp_path):
    run = RunFolder(tmp_path)
    assert run.configs() == run.logs() == []
    for name in ("config", "metrics"):
        suffix = {"config": "yaml", "metrics": "csv"}[name]
        for number in ("", ".10", ".2", ".old"):
            (tmp_path / f"{name}{number}.{suffix}").write_text("")
    assert [file.name for file in run.configs()] == [
        "config.yaml",
        "config.2.yaml",
        "config.10.yaml",
    ]
    assert [file.name for file in run.logs()] == ["metrics.2.csv", "metrics.10.csv", "metrics.csv"]


def test_old_metrics_are_kept(tmp_path):
    run = RunFolder(tmp_path)
    run.keep_old_metrics()
    assert run.logs() == []
    for start in ("first", "second"):
        run.metrics.write_text(start)
        run.keep_old_metrics()
    run.metrics.write_text("third")
    assert [file.read_text() for file in run.logs()] == ["first", "second", "third"]


def test_another_config_is_written_beside_the_first(tmp_path):
    run = RunFolder(tmp_path / "new")
    assert not run.belongs_to_another("a: 1\n")
    run.save_config("a: 1\n")
    assert not run.belongs_to_another("a: 1\n")
    run.save_config("a: 1\n")
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]
    assert run.belongs_to_another("a: 2\n")
    run.save_config("a: 2\n")
    run.save_config("a: 3\n")
    assert [file.read_text() for file in run.configs()] == ["a: 1\n", "a: 2\n", "a: 3\n"]


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (b"run: out\nmodel:\n  class_path: bdclean.purification.AdvrBD\n", True),
        (b"batch: 3\n", False),
        (b"run: there\n", False),
        (b"# run: class_path: bdclean.\n", False),
        (b"\xff\xfe", False),
    ],
)
def test_a_run_is_told_from_other_folders(tmp_path, text, ours):
    run = RunFolder(tmp_path)
    assert not run.is_run
    run.config.write_bytes(text)
    assert run.is_run is ours


def test_a_config_that_is_missing_or_none(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no config\.yaml; give folders"):
        run.read_config()
    deep, large = b"a: " + b"[" * 10_000, b"a: 1\n# " + b"x" * 200_000
    odd = (b"a: \0\n", b"a: [\n", b"a: !!python/object:os.system {}\n", b"? [a]\n: 1\n", b"")
    for text in (b"- 1\n", b"a: b: c\n", b"\xff", deep, large, *odd):
        run.config.write_bytes(text)
        with pytest.raises(ConfigError, match=r"config\.yaml is not"):
            run.read_config()
        with pytest.raises(ConfigError) as raised:
            run.read_config()
        assert "\n" not in str(raised.value)
    run.config.write_text("run: here\n")
    assert run.read_config() == {"run": "here"}
    with pytest.raises(ConfigError, match="no data module"):
        run.make_data()


def test_the_data_of_a_run(tmp_path):
    run = RunFolder(tmp_path)
    attack = {"class_path": "bdclean.attacks.BadNets", "init_args": {"target": 3, "rate": 0.2}}
    arguments = {"attack": attack, "splits": {"defense": 100, "probe": 50, "seed": 7}}
    write(run, {"data": {"class_path": "bdclean.data.Digits", "init_args": arguments}})
    data = run.make_data()
    assert isinstance(data, Digits)
    assert isinstance(data.attack, BadNets)
    assert (data.attack.target, data.splits.seed) == (3, 7)


# ---------------------------------------------------------------------- records


def test_a_record_without_a_schema_is_of_version_0(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.is_finished
    with pytest.raises(DataError, match=r"result\.json is missing; let the run end first"):
        run.read_record()
    run.record.write_text(json.dumps({"seed": 3}))
    assert run.is_finished
    assert run.read_record() == {"schema": 0, "seed": 3}
    run.record.write_text(json.dumps({"schema": SCHEMA, "seed": 3}))
    assert run.read_record() == {"schema": 1, "seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 2}', "schema=2: this version of bdclean reads records up to schema 1"),
        ('{"schema": "x"}', "schema=x"),
        ("[]", "is not a record"),
        ("{", "is not a readable record"),
        ("[" * 100_000, "is not a readable record"),
    ],
)
def test_what_is_no_record_is_told(tmp_path, text, message):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_record(tmp_path / "result.json")


def test_lines_of_a_csv_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'file,n\n"x, \xe9",3\n')
    assert read_csv(tmp_path / "a.csv") == [{"file": "x, \udce9", "n": "3"}]
    with pytest.raises(DataError, match=r"b\.csv is missing"):
        read_csv(tmp_path / "b.csv")


def test_reading_a_record_needs_neither_torch_nor_lightning(run_python):
    heavy = "{'torch', 'lightning', 'bdclean.data'}"
    script = f"import sys, bdclean.runs; print({heavy} & {{*sys.modules}})"
    assert run_python("-c", script).strip() == "set()"


def test_only_files_are_checkpoints_and_only_numbers_are_of_requeues(tmp_path):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "hpc_ckpt_2.ckpt").mkdir()
    assert run.newest_checkpoint() is None
    (tmp_path / "hpc_ckpt_notes.ckpt").write_text("mine")
    assert run.of_requeues() == []
    (tmp_path / "hpc_ckpt_3.ckpt").touch()
    assert run.of_requeues() == [tmp_path / "hpc_ckpt_3.ckpt"]


def test_a_config_that_is_no_text_is_another_one(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"run: \xff\xfe\n")
    assert RunFolder(tmp_path).belongs_to_another("run: x\n")
