"""`--run` and `--ckpt_path`, before anything is read or made of them."""

from pathlib import Path

import pytest

from bdclean.callbacks.products import stranger
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


# ---------------------------------------------------------------------- runs that have ended


def files(folder):
    """All files with what tells whether they were touched."""
    found = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


AGAIN = (
    ["--ckpt_path", "last"],
    ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.log_every_n_steps", "7"],
)


def test_a_run_that_has_ended_stays_as_it_is(capsys):
    main(VICTIM)
    capsys.readouterr()
    before = files("run")
    assert Path("run/metrics.csv") in before
    for words in AGAIN:
        main([*VICTIM, *words])
        said = capsys.readouterr()
        assert said.out.startswith(
            "Nothing was written, since run holds this run, which has ended: model.safetensors, "
            "result.json. A longer one is a new run, with another folder for --run.\n"
        )
        assert "this run has ended; nothing is trained." in said.err
        assert files("run") == before
    # what was left out is made up for, once
    tested = [word if word != "false" else "true" for word in VICTIM]
    main([*tested, "--ckpt_path", "last"])
    assert "Written to run: " in capsys.readouterr().out
    before = files("run")
    main([*tested, "--ckpt_path", "last"])
    assert "Measured on test images:" in capsys.readouterr().out
    assert files("run") == before
    # a later part of the same run is no end
    with pytest.raises(SystemExit, match="2"):
        main([*VICTIM, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert "and this one 6" in capsys.readouterr().err
    Path("run/checkpoints/last.ckpt").unlink()
    before = files("run")
    with pytest.raises(SystemExit, match="2"):
        main([*VICTIM, "--ckpt_path", "last"])
    assert "run holds this run, which has ended, and no checkpoint;" in capsys.readouterr().err
    assert files("run") == before


# ---------------------------------------------------------------------- folders of others


@pytest.mark.parametrize(
    "name", ["a.png", "cat/a.png", "suspect.pth", "runs/x/config.yaml", "\x1b"]
)
def test_a_fit_goes_into_no_folder_of_others(name, capsys):
    file = Path("mine") / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    with pytest.raises(SystemExit, match="2"):
        main([*VICTIM[:-1], "mine"])
    first = Path(name).parts[0].replace("\x1b", "\\x1b")
    told = capsys.readouterr().err
    assert told == (
        f"bdclean: --run mine: it holds {first}, but no config.yaml of a run; name a new or empty "
        "folder.\n"
    )
    assert [path for path in Path("mine").rglob("*") if path.is_file()] == [file]


def test_a_fit_goes_into_a_folder_with_notes():
    Path("run/wandb").mkdir(parents=True)
    Path("run/checkpoints").mkdir()
    for name in ("slurm-1.out", "slurm-1.err", "job.log", ".hidden", "job.sbatch", "notes.txt"):
        (Path("run") / name).write_text("mine")
    main(VICTIM)
    assert Path("run/model.safetensors").is_file()
    assert Path("run/slurm-1.out").read_text() == "mine"
    assert stranger(RunFolder(Path("nowhere"))) is None


# ---------------------------------------------------------------------- words given twice


TWICE = {
    "--run": ["fit", "--run", "a", "--run", "b"],
    "--ckpt_path": ["fit", "--ckpt_path", "a", "--ckpt_path=b"],
    "--test_after_fit": ["fit", "--test_after_fit", "a", "--test-after-fit", "b"],
    "--out": ["attack", "export", "--out", "a", "--out=b"],
    "--seed": ["demo", "--seed", "a", "--seed", "b"],
    "--size": ["sift", "photos", "--size", "a", "--size", "b"],
}


@pytest.mark.parametrize("option", TWICE)
def test_an_option_with_two_values_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(TWICE[option])
    told = capsys.readouterr().err
    assert told == f"bdclean: {option}: it is given twice, as a and as b; give it once.\n"


def test_of_settings_the_last_one_counts():
    main([*VICTIM, "--model.width", "6", "--model.width", "4", "--trainer.fast_dev_run", "true"])
