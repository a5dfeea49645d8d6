"""What a command does in a run folder that is in use, and what a refused one leaves behind."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.cli import main
from bdclean.data import Digits
from bdclean.locks import NAME, Holder, started
from bdclean.modules import Needs, Recipe, Stage, Training
from bdclean.purification import Purifier
from bdclean.tabular import read_csv
from bdclean.types import ImageFacts

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = ["-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"]
TRAIN = [*BASE, "-c", "train/supervised/fast", "--model.width", "4"]
SHORT = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "2"]
VICTIM = ["fit", *TRAIN, *SHORT, "--test_after_fit", "false", "--run", "run"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights():
    """A small network of the data."""
    save_model(build(ModelInfo("resnet18", 10, 32, (0.1,) * 3, (0.2,) * 3, 4)), "net.safetensors")
    return ["--model.weights", "net.safetensors"]


@pytest.fixture
def held():
    """A lock of a process that lives in the folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    holder = replace(Holder.here(), pid=process.pid, started=started(process.pid))
    Path("run").mkdir()
    (Path("run") / NAME).write_text(json.dumps(asdict(holder)))
    yield process
    process.kill()
    process.wait()


def state(folder="."):
    """All folders, and all files with what tells whether they were touched."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def refused(words, capsys):
    """The one line of a command that must leave everything as it was."""
    capsys.readouterr()
    before = state()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert state() == before
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("bdclean: ")]) == 1
    return told[-1]


# ---------------------------------------------------------------------- in use


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "sift"])
def test_a_folder_in_which_a_command_works_is_refused(command, held, weights, capsys):
    words = [command, *TRAIN, *weights, "--data.splits.val", "50", "--run", "run"]
    if command == "sift":
        for name in ("cat", "dog"):
            (Path("photos") / name).mkdir(parents=True)
        words = ["sift", "photos", "--run", "run"]
        for name in ("cat", "dog"):
            Image.new("RGB", (8, 8)).save(Path("photos") / name / "0.png")
    told = refused(words, capsys)
    assert told.startswith("bdclean: run: another command works in this folder since ")
    assert f"(process {held.pid} on " in told
    assert told.endswith("; let it end, or name another folder with --run.")


def test_a_development_run_needs_no_lock(held, weights):
    main(["fit", *TRAIN, *weights, "--run", "run", "--trainer.fast_dev_run", "true"])
    assert [path.name for path in Path("run").iterdir()] == [NAME]


def test_a_resume_is_refused_while_the_run_lives(capsys, held):
    lock = (Path("run") / NAME).read_text()
    (Path("run") / NAME).unlink()
    main(VICTIM)
    (Path("run") / NAME).write_text(lock)
    told = refused([*VICTIM, "--ckpt_path", "last"], capsys)
    assert "another command works in this folder" in told


def test_what_a_killed_command_left_is_taken_over_and_swept():
    left = [NAME, ".config.yaml.0a1b2c3d.tmp", ".last.ckpt.99"]
    Path("run/checkpoints").mkdir(parents=True)
    Path("run", NAME).write_text(json.dumps(asdict(replace(Holder.here(), pid=2**22 + 1))))
    for name in left[1:]:
        Path("run", name).write_text("")
        Path("run/checkpoints", name).write_text("")
    main(VICTIM)
    assert not list(Path("run").rglob(".*"))


@pytest.mark.slow
def test_of_two_fits_at_once_one_trains(begin):
    words = [word if word != "2" else "12" for word in VICTIM]
    begun = [begin("-m", "bdclean", *words) for _ in range(2)]
    told = [process.communicate()[1] for process in begun]
    status = [process.returncode for process in begun]
    assert sorted(status) == [0, 2], told
    assert "another command works" in told[status.index(2)]
    losses = read_csv(Path("run/metrics.csv"))
    assert len({row["epoch"] for row in losses}) == len(losses)


@pytest.mark.slow
def test_a_fit_whose_folder_was_removed_ends_and_leaves_the_next_one_alone():
    words = [word if word != "2" else "400" for word in VICTIM]
    first = subprocess.Popen(
        [sys.executable, "-m", "bdclean", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not Path("run/checkpoints/last.ckpt").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shutil.rmtree("run", ignore_errors=True)
    while Path("run").exists() and time.monotonic() < deadline:  # it was writing just then
        shutil.rmtree("run", ignore_errors=True)
    main(VICTIM)
    told = first.communicate(timeout=120)[1]
    assert first.returncode == 2, told
    assert "run: the lock of this command is gone, so that another one may work" in told
    assert "Traceback" not in told
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert len({row["epoch"] for row in read_csv(Path("run/metrics.csv"))}) == 2
    assert not list(Path("run").rglob(".*"))


# ---------------------------------------------------------------------- what must not be lost


def foreign(name):
    """A folder that holds somebody's file."""
    place = Path("theirs", name)
    place.parent.mkdir(parents=True)
    place.write_text("mine")


THEIRS = ("model.safetensors", "result.json", "metrics.csv", "plan.json", "checkpoints/last.ckpt")


@pytest.mark.parametrize("name", THEIRS)
def test_a_fit_writes_over_nobodys_files(name, capsys, monkeypatch):
    foreign(name)
    Path("theirs/deep").mkdir()
    told = f"it holds {name}, but no config.yaml of a run, and a fit writes files of such names; "
    assert f"--run theirs: {told}" in refused([*VICTIM[:-1], "theirs"], capsys)
    monkeypatch.chdir("theirs/deep")
    assert f"--run ..: {told}" in refused([*VICTIM[:-1], ".."], capsys)


def test_a_purification_does_not_write_over_its_suspect(capsys):
    main(VICTIM)
    Path("suspects").mkdir()
    Path("suspects/model.safetensors").write_bytes(Path("run/model.safetensors").read_bytes())
    words = ["fit", *BASE, "-c", "purify/bcu", "--model.recipe.epochs", "1"]
    for place in ("suspects", "run"):
        weights = f"{place}/model.safetensors"
        told = refused([*words, "--model.weights", weights, "--run", place], capsys)
        assert told.endswith(
            f"--model.weights {weights}: this run would write over it; name another folder with "
            "--run."
        )


@pytest.mark.parametrize("name", ["result.json", "model.safetensors", "checkpoints/last.ckpt"])
def test_what_could_not_be_written_at_the_end_is_told_at_the_start(name, capsys):
    Path("run", name).mkdir(parents=True)
    told = f"run/{name} is no file, and this command writes a file of that name; move it away, or"
    assert told in refused(VICTIM, capsys)


def test_the_corrected_command_works_in_the_folder_of_one_that_failed(capsys):
    words = [*VICTIM, "--trainer.limit_train_batches", "5"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--model.optimizer.lr", "1e30"])
    assert "has diverged" in capsys.readouterr().err
    assert [path.name for path in Path("run").iterdir()] == ["config.yaml"]
    main(words)
    assert {path.name for path in Path("run").iterdir()} == FILES
    assert "1e+30" not in Path("run/config.yaml").read_text()
    told = refused([*words, "--model.optimizer.lr", "0.3"], capsys)
    assert told.endswith("another config. Choose another folder with --run, or delete that one.")


# ---------------------------------------------------------------------- what is left behind

FILES = {
    *("config.yaml", "metrics.csv", "model.safetensors", "result.json", "checkpoints"),
    *("plan.json", "plan.safetensors", "trigger.safetensors"),
}


def test_a_run_folder_holds_what_the_docs_list():
    main(VICTIM)
    assert {path.name for path in Path("run").iterdir()} == FILES
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()
    assert not [name for name in FILES if f"`{name}" not in page]


REFUSED = {
    "a missing attack file": ["--data.attack.target", "10"],
    "a test set that is missing": ["--data.splits.defense", "1400"],
    "too few images": ["--model.batch_size", "5000", "--data.splits.defense", "1400"],
    "a missing weights file": ["--model.weights", "no.safetensors"],
    "a missing checkpoint": ["--ckpt_path", "no.ckpt"],
    "a device that is not there": ["--trainer.devices", "0"],
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("run", ["new/deep", "there"])
def test_a_refused_fit_leaves_nothing(case, run, capsys):
    Path("there").mkdir()
    refused([*VICTIM[:-1], run, *REFUSED[case]], capsys)


RESUMED = {
    "another width": (["--model.width", "8"], "--model.width (4 -> 8): a run goes on with"),
    "other data": (["--data.attack.rate", "0.3"], "--data.attack.rate (0.06 -> 0.3): a run"),
    "another seed": (["--seed_everything", "7"], "--seed_everything (0 -> 7): a run"),
    "another length": (["--trainer.max_epochs", "3"], "last.ckpt: the checkpoint's run is 4 steps"),
    "another method": (
        ["-c", "train/simclr/fast", "--run", "run"],
        "--model (bdclean.training.Supervised -> bdclean.training.SimCLR)",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_refused_resume_leaves_all_where_it_is(case, capsys):
    main(VICTIM)
    words, told = RESUMED[case]
    assert told in refused([*VICTIM, *words, "--ckpt_path", "last"], capsys)


@pytest.mark.parametrize("run", ["run", "other"])
def test_checkpoints_of_other_methods_are_named_with_their_file(run, capsys):
    main(VICTIM)
    Path("run/config.yaml").unlink()
    words = ["fit", *BASE, "-c", "train/simclr/fast", "--model.width", "4", "--run", run]
    words += ["--ckpt_path", "run/checkpoints/last.ckpt"]
    told = "--ckpt_path run/checkpoints/last.ckpt: the checkpoint was written by supervised, and"
    assert told in refused(words, capsys)


def test_images_that_have_changed_are_refused(capsys, monkeypatch):
    main(VICTIM)
    whole = Digits.read_train

    def other(self):
        images = whole(self)
        images.images[0] = 0
        return images

    monkeypatch.setattr(Digits, "read_train", other)
    told = refused([*VICTIM, "--ckpt_path", "last"], capsys)
    assert "last.ckpt: the run began with others of these: training images: 1,400 images, " in told


def test_a_resume_speaks_for_itself(capfd):
    main(VICTIM)
    capfd.readouterr()
    main([*VICTIM, "--ckpt_path", "last"])
    told = capfd.readouterr().err
    assert told.splitlines()[-1].endswith("last.ckpt: this run has ended; nothing is trained.")
    assert "Restor" not in told
    assert "not empty" not in told


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint(begin):
    main(VICTIM)
    checkpoint = Path("run/checkpoints/last.ckpt")
    for product in ("result.json", "model.safetensors"):
        Path("run", product).unlink()
    first = torch.load(checkpoint, weights_only=True)
    assert first["epoch"] == 1
    script = "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, -1))"
    script += "; from bdclean.cli import main; main(sys.argv[1:])"
    words = [*VICTIM[:-1], "other"]
    Path("other/checkpoints").mkdir(parents=True)
    Path("other/checkpoints/last.ckpt").write_bytes(checkpoint.read_bytes())
    Path("other/config.yaml").write_text(Path("run/config.yaml").read_text())
    process = begin("-c", script, *words, "--ckpt_path", "last")
    _, told = process.communicate()
    assert process.returncode == 2
    assert told.splitlines()[-1].endswith("cannot be written: File too large.")
    assert "Traceback" not in told
    again = torch.load("other/checkpoints/last.ckpt", weights_only=True)
    assert again["epoch"] == 1
    assert not list(Path("other").rglob(".*"))


# ---------------------------------------------------------------------- users' own classes


class NoSuper(Purifier):
    """Forgets the class above."""

    name, needs = "nosuper", Needs()

    def __init__(self, facts: ImageFacts, weights: str | None = None) -> None:
        self.facts = facts

    def plan(self):
        return ()


class LateSuper(NoSuper):
    """Makes a network before."""

    def __init__(self, facts: ImageFacts, weights: str | None = None) -> None:
        self.layer = torch.nn.Linear(1, 1)


class NoTraining(Training):
    """Forgets it as well."""

    name, needs = "notraining", Needs()

    def __init__(self, facts: ImageFacts, weights: str | None = None) -> None:
        self.facts = facts


class PlanNone(Purifier):
    """Has no plan."""

    name, needs = "plannone", Needs()

    def __init__(self, facts: ImageFacts, weights: str | None = None) -> None:
        super().__init__(facts, weights)

    def plan(self):
        return None


class NoStep(PlanNone):
    """Reads no labels, and has no loss of its own."""

    name = "nostep"

    def plan(self):
        recipe = Recipe(epochs=1, batch_size=8)
        return (Stage("only", recipe, reads=lambda: recipe.view("defense")),)


OWN = {
    NoSuper: "NoSuper: its __init__ must begin with super().__init__(...).",
    LateSuper: "LateSuper: its __init__ must begin with super().__init__(...).",
    NoTraining: "NoTraining: its __init__ must begin with super().__init__(...).",
    PlanNone: "PlanNone: plan() must return a tuple of stages, and it returned None.",
    NoStep: "NoStep: the stage only takes the cross-entropy with labels, and its batches show none",
}


@pytest.mark.parametrize("kind", OWN)
def test_users_own_classes_are_told_in_one_sentence(kind, weights, capsys):
    words = ["fit", *BASE, "--model", f"{__name__}.{kind.__name__}", *weights, "--run", "run"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--trainer.reload_dataloaders_every_n_epochs", "1"])
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"bdclean: {OWN[kind]}")
