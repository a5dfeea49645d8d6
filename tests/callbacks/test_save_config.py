"""The config of a fit is kept beside its results, and that of another run is never replaced."""

import shutil
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule
from torch.nn import Linear

from bdclean.callbacks import SaveRunConfig
from bdclean.errors import ConfigError

MODULE = LightningModule()


class GoesOn(SaveRunConfig):
    may_change = False
    way_out = "Name another folder."


def sections(tmp_path, ckpt_path, **changed):
    """The callback of a config with the sections that ours have."""
    values = {
        "seed_everything": 0,
        "model.init_args.width": 4,
        "model.init_args.weights": str(tmp_path / "suspect.safetensors"),
        "data.class_path": "bdclean.data.Digits",
        "data.init_args.cache": True,
        "trainer.max_epochs": 3,
        "trainer.devices": 1,
        "run": "here",
        "ckpt_path": ckpt_path,
    }
    parser, words = ArgumentParser(), []
    for key, value in (values | {k.replace("__", "."): v for k, v in changed.items()}).items():
        parser.add_argument(f"--{key}", type=type(values[key]) if values[key] is not None else str)
        words += [] if value is None else [f"--{key}", str(value)]
    return SaveRunConfig(parser, parser.parse_args(words))


@pytest.fixture
def begun(tmp_path):
    """A run that was begun with `sections`, and its checkpoint."""
    (tmp_path / "suspect.safetensors").write_bytes(b"suspect")
    run = tmp_path / "run"
    sections(tmp_path, None).on_train_start(trainer(run), MODULE)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    return run


FIXED = {
    "seed_everything": (1, "--seed_everything (0 -> 1)"),
    "model__init_args__width": (8, "--model.width (4 -> 8)"),
    "model__init_args__weights": (None, "suspect.safetensors -> None)"),
    "data__class_path": ("other.Data", "--data (bdclean.data.Digits -> other.Data)"),
}


@pytest.mark.parametrize("key", FIXED)
@pytest.mark.parametrize("checkpoint", ["last", "{run}/checkpoints/last.ckpt"])
def test_a_run_goes_on_with_its_method_data_and_seed(key, checkpoint, begun, tmp_path):
    value, told = FIXED[key]
    checkpoint, before = checkpoint.format(run=begun), names(begun)
    changed = sections(tmp_path, checkpoint, **{key: value})
    with pytest.raises(ConfigError, match="leave it out, or start a new run with --run") as raised:
        changed.require_own(begun)
    assert told in str(raised.value)
    if checkpoint != "last":  # nor does it in another folder
        with pytest.raises(ConfigError, match="a run goes on with"):
            changed.require_own(tmp_path / "new")
    assert names(begun) == before


def test_a_checkpoint_of_another_run_does_not_take_the_place_of_one(begun, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(begun, other)
    goes_on = sections(tmp_path, str(begun / "checkpoints" / "last.ckpt"))
    with pytest.raises(ConfigError, match=r"last\.ckpt is of another run than that in .*other;"):
        goes_on.require_own(other)
    shutil.rmtree(other / "checkpoints")  # which holds nothing to lose
    goes_on.require_own(other)
    goes_on.require_own(begun)


def test_all_keys_that_differ_are_named(begun, tmp_path):
    changed = sections(tmp_path, "last", seed_everything=1, model__init_args__width=8)
    with pytest.raises(ConfigError, match=r"^--model\.width \(4 -> 8\), --seed_.*leave them out"):
        changed.require_own(begun)


@pytest.mark.parametrize(
    "free",
    [
        {"trainer__devices": 2, "run": "there", "data__init_args__cache": False},
        {"trainer__max_epochs": 9},
    ],
)
def test_where_and_how_long_a_run_goes_on_may_change(free, begun, tmp_path):
    sections(tmp_path, "last", **free).require_own(begun)


def test_a_suspect_that_was_moved_is_the_same(begun, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(b"suspect")
    sections(tmp_path, "last", model__init_args__weights=moved).require_own(begun)
    moved.write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"--model\.weights"):
        sections(tmp_path, "last", model__init_args__weights=moved).require_own(begun)
    # the file that the run began with is gone: its checkpoint knows what was in it
    (tmp_path / "suspect.safetensors").unlink()
    sections(tmp_path, "last", model__init_args__weights=moved).require_own(begun)


def callback(rate=0.1, ckpt_path=None, kind=SaveRunConfig):
    parser = ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--ckpt_path", type=str, default=None)
    words = ["--rate", str(rate)] + ([] if ckpt_path is None else ["--ckpt_path", ckpt_path])
    return kind(parser, parser.parse_args(words))


def trainer(folder, refusal=None, **changes):
    """What the callback asks of a Trainer; `refusal` is what the first process has found."""
    strategy = SimpleNamespace(broadcast=lambda mine: mine if refusal is None else refusal)
    facts = {"default_root_dir": str(folder), "is_global_zero": True, "fast_dev_run": 0}
    return SimpleNamespace(**(facts | {"strategy": strategy} | changes))


def start(folder, *arguments, **changes):
    saved = callback(*arguments)
    saved.setup(trainer(folder, **changes), MODULE, "fit")
    saved.on_fit_start(trainer(folder, **changes), MODULE)
    saved.on_train_start(trainer(folder, **changes), MODULE)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_it_is_written_when_the_fit_starts_and_not_before(tmp_path):
    folder = tmp_path / "deep" / "run"
    saved = callback(0.5, "last")
    saved.setup(trainer(folder), MODULE, "fit")
    assert not folder.exists()
    saved.on_fit_start(trainer(folder), MODULE)  # the module may still refuse the checkpoint
    assert not folder.exists()
    saved.on_train_start(trainer(folder), MODULE)
    assert names(folder) == ["config.yaml"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == {"rate": 0.5, "ckpt_path": None}  # so that it can be run again


def test_an_equal_one_is_left_alone(tmp_path):
    start(tmp_path)
    before = (tmp_path / "config.yaml").stat().st_mtime_ns
    start(tmp_path)
    start(tmp_path, 0.1, "last")
    assert names(tmp_path) == ["config.yaml"]
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == before


def test_a_run_that_was_copied_goes_on_with_its_config(begun, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    before = (copy / "config.yaml").read_bytes()
    saved = sections(tmp_path, "last")
    saved.config["run"] = str(copy)
    saved.on_train_start(trainer(copy), MODULE)
    assert names(copy) == ["checkpoints", "config.yaml"]
    assert (copy / "config.yaml").read_bytes() == before


def test_that_of_another_run_is_refused(tmp_path):
    start(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"config\.yaml belongs to a run with another config\."):
        start(tmp_path, 0.2)
    with pytest.raises(ConfigError, match="Choose another folder with --run"):
        callback(0.2).require_own(tmp_path)
    callback().require_own(tmp_path)
    callback(0.2).require_own(tmp_path / "new")
    assert names(tmp_path) == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_resumed_run_may_go_on_with_another(tmp_path):
    start(tmp_path)
    callback(0.2, "last").require_own(tmp_path)
    with pytest.warns(UserWarning, match=r"goes on with other settings.*--rate: 0\.1 -> 0\.2\.$"):
        start(tmp_path, 0.2, "last")
    with pytest.warns(UserWarning, match=r"--rate: 0\.1 -> 0\.3"):
        start(tmp_path, 0.3, "last")
    assert names(tmp_path) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    rates = [yaml.safe_load((tmp_path / name).read_text())["rate"] for name in names(tmp_path)]
    assert rates == [0.2, 0.3, 0.1]


LEFT = {
    "a checkpoint": "checkpoints/last.ckpt",
    "one of a requeued job": "hpc_ckpt_1.ckpt",
    "weights": "model.safetensors",
    "a record": "result.json",
    "flags": "suspects.csv",
}


@pytest.mark.parametrize("left", [None, *LEFT])
def test_a_fit_that_left_nothing_but_its_config_is_in_nobodys_way(left, tmp_path):
    (tmp_path / "suspect.safetensors").write_bytes(b"suspect")
    run = tmp_path / "run"
    sections(tmp_path, None).on_train_start(trainer(run), MODULE)
    for losses in ("metrics.1.csv", "metrics.csv"):
        (run / losses).write_text("of the other settings")
    corrected = sections(tmp_path, None, model__init_args__width=8)
    if left is None:
        corrected.require_own(run)
        corrected.on_fit_start(trainer(run), MODULE)
        corrected.on_train_start(trainer(run), MODULE)
        assert names(run) == ["config.yaml"]
        assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["width"] == 8
        return
    (run / LEFT[left]).parent.mkdir(exist_ok=True)
    (run / LEFT[left]).write_bytes(b"")
    before = names(run)
    with pytest.raises(ConfigError, match=r"another config\. Choose.*or delete that one\.$"):
        corrected.require_own(run)
    assert names(run) == before


def test_the_suspect_is_never_written_over(tmp_path):
    for name in ("suspect", "model"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"suspect")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    sections(tmp_path, None, model__init_args__weights=tmp_path / "model.safetensors").require_own(
        tmp_path / "new"
    )
    for weights in (tmp_path / "model.safetensors", link / "model.safetensors"):
        for checkpoint in (None, "last"):
            saved = sections(tmp_path, checkpoint, model__init_args__weights=weights)
            for run in (tmp_path, link):
                with pytest.raises(
                    ConfigError, match=r"^--model\.weights .*write over it; name an"
                ):
                    saved.require_own(run)


def test_a_disk_without_room_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1 << 20))
    module = LightningModule()
    module.layer = Linear(1 << 9, 1 << 9)
    told = r"run: 1\.0 MiB are free there, and the result takes at least 1\.0 MiB; make room, or"
    with pytest.raises(ConfigError, match=told):
        callback().on_fit_start(trainer(tmp_path / "run"), module)
    callback().on_fit_start(trainer(tmp_path / "run"), MODULE)
    assert names(tmp_path) == []


def test_unless_it_has_to_go_on_as_it_began(tmp_path):
    start(tmp_path)
    with pytest.raises(ConfigError, match=r"another config\. Name another folder\."):
        callback(0.2, "last", GoesOn).require_own(tmp_path)
    callback(0.1, "last", GoesOn).require_own(tmp_path)


def test_a_development_run_writes_nothing(tmp_path):
    start(tmp_path, fast_dev_run=1)
    assert names(tmp_path) == []


def test_other_processes_write_nothing_and_learn_of_a_refusal(tmp_path):
    start(tmp_path, is_global_zero=False)
    assert names(tmp_path) == []
    with pytest.raises(ConfigError, match="it is taken"):
        start(tmp_path, is_global_zero=False, refusal="it is taken")


def test_it_is_written_once(tmp_path):
    saved = callback()
    saved.on_train_start(trainer(tmp_path), MODULE)
    (tmp_path / "config.yaml").unlink()
    saved.on_train_start(trainer(tmp_path), MODULE)
    assert names(tmp_path) == []


def test_a_run_with_nothing_left_to_train_is_written_at_its_end(tmp_path):
    saved = callback()
    saved.on_fit_start(trainer(tmp_path), MODULE)
    saved.on_fit_end(trainer(tmp_path), MODULE)
    assert names(tmp_path) == ["config.yaml"]
