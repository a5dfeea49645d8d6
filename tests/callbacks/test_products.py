"""What lies in a folder before a command writes there."""

import json
import os

import pytest

from bdclean.callbacks.products import OF_FIT, foreign, is_barren, require_files, require_writable
from bdclean.errors import ConfigError, FileError
from bdclean.runs import RunFolder

CONFIG = "run: here\nmodel:\n  class_path: bdclean.training.Supervised\n"
NAMES = [*OF_FIT, "checkpoints/last.ckpt", "checkpoints/epoch=3.ckpt", "hpc_ckpt_1.ckpt"]


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def put(run, name, text="mine"):
    place = run.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_such_a_file_and_no_config_is_not_ours(run, name):
    assert foreign(run, None) is None  # it is not there
    put(run, "notes.txt")
    put(run, "test.json")  # of a test alone, which writes no config
    put(run, "predictions-clean.safetensors")
    assert foreign(run, None) is None
    put(run, name)
    told = foreign(run, None)
    assert told.startswith(f"--run {run.path}: it holds {name}, but no config.yaml of a run, and")
    put(run, "config.yaml", CONFIG)
    assert foreign(run, None) is None


@pytest.mark.parametrize("checkpoint", ["last", "{run}/checkpoints/last.ckpt"])
def test_a_run_that_lost_its_config_goes_on_from_its_own_checkpoint(run, checkpoint, tmp_path):
    put(run, "checkpoints/last.ckpt")
    put(run, "metrics.csv")
    assert foreign(run, checkpoint.format(run=run.path)) is None
    assert "it holds metrics.csv" in foreign(run, str(tmp_path / "other/checkpoints/last.ckpt"))
    (run.checkpoints / "last.ckpt").unlink()
    assert "it holds metrics.csv" in foreign(run, "last")  # there is none: it would begin anew


@pytest.mark.parametrize("name", [*NAMES, None])
def test_a_fit_that_has_nothing_to_keep(run, name):
    assert not is_barren(run)
    put(run, "config.yaml", "batch: 3\n")  # of something else
    assert not is_barren(run)
    put(run, "config.yaml", CONFIG)
    put(run, "config.1.yaml", CONFIG)
    put(run, "metrics.1.csv")
    if name is not None:
        put(run, name)
    assert is_barren(run) == (name in (None, "metrics.csv"))


OTHERS = ["config.yaml", "test.json", "checkpoints/last.ckpt", "predictions-a.safetensors"]


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_in_the_way(run, kind, command):
    require_files(run, command)
    for name in [*OF_FIT, *OTHERS]:
        place = put(run, name)
        place.unlink()
        if kind == "folder":
            place.mkdir()
        elif kind == "link":
            place.symlink_to(run.path / "nowhere")
        else:
            os.mkfifo(place)
        what = "a link to nowhere" if kind == "link" else "no file"
        with pytest.raises(ConfigError, match=f"^{place} is {what}, and this command writes a fil"):
            require_files(run, command)
        place.rmdir() if kind == "folder" else place.unlink()
    require_files(run, command)
    run.checkpoints.rmdir()
    if kind != "folder":
        run.checkpoints.symlink_to("nowhere") if kind == "link" else os.mkfifo(run.checkpoints)
        with pytest.raises(ConfigError, match=r"checkpoints is .* writes a folder of that name"):
            require_files(run, command)


def test_links_to_files_are_files(run, tmp_path):
    (tmp_path / "elsewhere").write_text("x")
    put(run, "config.yaml", CONFIG)
    (run.path / "metrics.csv").symlink_to(tmp_path / "elsewhere")
    require_files(run, "fit")


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (json.dumps({"schema": 1, "metrics": {}}), True),
        (json.dumps({"metrics": {"acc": 1.0}}), True),
        (json.dumps({"questions": []}), False),
        ("[]", False),
        ("{", False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_somebodys_test_json_is_not_written_over(run, text, ours):
    put(run, "test.json", text)
    require_files(run, "fit")
    if ours:
        require_files(run, "test")
        return
    with pytest.raises(ConfigError, match=r"its test\.json is no record of bdclean; name another"):
        require_files(run, "test")


def test_checkpoints_that_cannot_be_written_are_told(run, tmp_path):
    require_writable(run)
    assert not run.path.exists()
    run.checkpoints.mkdir(parents=True)
    require_writable(run)
    assert not list(run.checkpoints.iterdir())
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to("/proc/self")  # where not even root can
    with pytest.raises(FileError, match=r"run/checkpoints/\.probe cannot be written: "):
        require_writable(run)
