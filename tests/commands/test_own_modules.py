"""No file of the current folder runs, but for modules that a class path names."""

import os
import subprocess
import sys

import pytest

from bdclean.commands.own_modules import _FINDER, allow

STRAY = ("tabulate", "torch_xla", "yaml", "numpy", "csv", "email", "json", "random", "matplotlib")
FIT = (
    *("-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"),
    *("-c", "train/supervised/fast", "--model.width", "4", "--trainer.max_epochs", "1"),
)
MODULE = "from bdclean.training import Supervised\nclass Own(Supervised):\n    '''Mine.'''\n"


@pytest.fixture
def place(tmp_path):
    for name in STRAY:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    return tmp_path


def in_a_process(place, *words, **variables):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], ["methods"], ["fit", *FIT], ["fit", "--model", "yaml.Loader"]],
    ids=lambda words: " ".join(words[:2]),
)
def test_stray_files_do_not_run(place, words):
    status, said = in_a_process(place, "-m", "bdclean", *words)
    assert status == (2 if words[-1] == "yaml.Loader" else 0), said
    assert not (place / "canary").exists()


def test_the_installed_command_runs_none_either(place):
    code = "import sys; from bdclean.cli import main; main(sys.argv[1:])"
    assert in_a_process(place, "-P", "-c", code, "methods")[0] == 0
    assert not (place / "canary").exists()


@pytest.mark.parametrize("config", [False, True])
def test_a_module_that_is_named_is_found(place, config):
    (place / "mine.py").write_text(MODULE)
    (place / "mine.yaml").write_text("model: {class_path: mine.Own}\n")
    named = ["-c", "mine.yaml"] if config else ["--model.help", "mine.Own"]
    status, said = in_a_process(place, "-m", "bdclean", "fit", *named, "--help")
    assert status == 0, said
    assert "Mine." in said
    assert not (place / "canary").exists()


def test_a_process_that_a_run_starts_finds_it_too(place):
    (place / "mine.py").write_text("print('found')\n")
    code = "import bdclean.cli, mine"
    assert in_a_process(place, "-P", "-c", code)[0] == 1
    assert in_a_process(place, "-P", "-c", code, BDCLEAN_OWN_MODULES="mine") == (0, "found\n")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["--model", "mine.Own"], {"mine"}),
        (["--model=mine.deep.Own", "--data", "other.Data"], {"mine", "other"}),
        (['--trainer.logger={"class_path": "mine.Logger"}'], {"mine"}),
        ({"trainer": {"callbacks": [{"class_path": "mine.Back"}]}}, {"mine"}),
        (["--model.recipe.lr", "0.1", "-c", "a/b.yaml", "--x=runs/v/model.safetensors"], set()),
        (["--model.arch", "timm:resnet18.a1_in1k", "model.safetensors"], set()),
    ],
)
def test_class_paths_are_told_from_other_words(tmp_path, monkeypatch, settings, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_FINDER, "names", set())
    monkeypatch.setenv("BDCLEAN_OWN_MODULES", "")
    (tmp_path / "model.safetensors").touch()
    allow(settings)
    assert _FINDER.names == names
