"""`--run` and `--ckpt_path`, before anything is read or made of them."""

from pathlib import Path

import pytest

from bdclean.cli import main
from bdclean.commands.run_place import check_checkpoint, check_run, newest_checkpoint, run_folder
from bdclean.errors import ConfigError
from bdclean.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")
VICTIM = [
    *("fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "train/supervised/fast"),
    *("--model.width", "4", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--test_after_fit", "false", "--run", "run"),
]
LONG = "x" * 300


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in a folder with a config of something else, as the one above."""
    here = tmp_path / "here"
    here.mkdir()
    for folder in (tmp_path, here):
        (folder / "config.yaml").write_text("batch: 3\n")
    monkeypatch.chdir(here)
    return here


WRONG = {
    "best": "--ckpt_path='best': give a checkpoint file, as RUN/checkpoints/last.ckpt, or `last` f",
    "hpc": "--ckpt_path='hpc': give a checkpoint file, as RUN/checkpoints/last.ckpt, or `last` for",
    "": "--ckpt_path='': give a checkpoint file, as RUN/checkpoints/last.ckpt, or `last` for the n",
    "folder": "--ckpt_path folder: it is a folder; give the file, as checkpoints/last.ckpt of a ru",
    "no.ckpt": "--ckpt_path no.ckpt: there is no such file on this machine.",
    LONG: f"--ckpt_path {LONG}: there is no such file on this machine.",
    "http://127.0.0.1:9/x": "--ckpt_path http://127.0.0.1:9/x: there is no such file on this mach",
    "registry:x": "--ckpt_path registry:x: there is no such file on this machine.",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_is_no_checkpoint_is_told(given, capsys):
    Path("folder").mkdir()
    with pytest.raises(ConfigError) as raised:
        check_checkpoint(given)
    assert str(raised.value).startswith(WRONG[given])
    if given == "best":
        for command in ("fit", "test"):
            with pytest.raises(SystemExit, match="2"):
                main([command, *VICTIM[1:], "--ckpt_path", given])
            assert capsys.readouterr().err.startswith(f"bdclean: {WRONG[given]}")
        assert not Path("run").exists()


@pytest.mark.parametrize("given", [None, "last", "a.ckpt", Path("a.ckpt"), "./best"])
def test_what_may_be_one_passes(given):
    Path("a.ckpt").touch()
    Path("best").touch()
    check_checkpoint(given)


def test_a_plugin_may_read_others():
    check_checkpoint("s3://bucket/last.ckpt", local=False)
    with pytest.raises(ConfigError, match="give a checkpoint file"):
        check_checkpoint("best", local=False)


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("checkpoint", [None, "last", "other/checkpoints/last.ckpt"])
def test_a_config_nearby_makes_no_run_of_a_word(command, checkpoint):
    Path("last").touch()
    Path("other/checkpoints").mkdir(parents=True)
    Path("other/config.yaml").write_text("")
    Path("other/checkpoints/last.ckpt").touch()
    elsewhere = command == "test" and checkpoint not in (None, "last")
    place = Path("other").resolve() if elsewhere else Path("mine")
    assert run_folder(command, "mine", checkpoint) == RunFolder(place)


def test_a_run_goes_on_and_is_tested_beside_other_configs(capsys):
    main(VICTIM)
    main([*VICTIM, "--ckpt_path", "last"])
    main(["test", "--run", "run"])
    assert "Written to run: test.json" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "run"]


def test_the_newest_checkpoint(capsys):
    run = RunFolder(Path("run"))
    with pytest.raises(ConfigError, match="--ckpt_path last: run holds no checkpoint"):
        newest_checkpoint("test", run)
    assert newest_checkpoint("fit", run) is None
    assert "There is no checkpoint in run yet" in capsys.readouterr().out
    run.checkpoints.mkdir(parents=True)
    run.last_checkpoint.touch()
    assert newest_checkpoint("fit", run) == newest_checkpoint("test", run) == "last"


# ---------------------------------------------------------------------- --run of an evaluation

NO_RUN = {
    "nosuch": "there is no such folder; give a folder that `bdclean fit` wrote, or data and a meth",
    "plain": "there is no config.yaml in it; give a folder that `bdclean fit` wrote, or data and a",
    "plain/x": "it is a file; give a folder that `bdclean fit` wrote",
}


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
@pytest.mark.parametrize("run", NO_RUN)
@pytest.mark.parametrize("more", [[], ["--model.weights", "x.safetensors"]])
def test_a_folder_without_a_run_is_named(command, run, more, capsys):
    Path("plain").mkdir()
    Path("plain/x").touch()
    for words in (["--run", run, *more], [*more, f"--run={run}"]):
        with pytest.raises(SystemExit, match="2"):
            main([command, *words])
        assert f"bdclean: --run {run}: {NO_RUN[run]}" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "plain"]


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "data/digits", "--run", "new"],
        ["--config=a.yaml", "--run", "new"],
        ["--data", "Digits", "--run", "new"],
        ["--data.class_path=Digits", "--run=new"],
        ["--model", "KNN"],
        ["--run"],
        [],
    ],
)
def test_other_words_may_give_the_data(words):
    check_run(words)
