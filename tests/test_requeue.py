"""A SLURM job that is requeued ends with the weights and the numbers of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Send, fork, forked, wait
from safetensors.torch import load_file

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.cli import main
from bdclean.commands.lightning import BdcleanCLI

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "victim",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
BASE = [
    *("fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"),
    *("--trainer.precision", "32-true"),
]
VICTIM = [
    *(*BASE, "-c", "train/supervised/fast", "--model.width", "4", "--trainer.max_epochs", "2"),
    *("--trainer.limit_train_batches", "4", "--data.splits.val", "40"),
    *("--data.validate_in_fit", "true", "--model.batch_size", "32"),
]
CBD = [
    *(*BASE, "-c", "purify/cbd/fast", "--model.recipe.epochs", "2", "--model.pgd.steps", "1"),
    *("--model.recipe.batch_size", "100", "--trainer.limit_train_batches", "2"),
]
MOMENTS = {
    "before the first step": ("on_train_batch_start", 1),
    "within the first step": ("on_before_backward", 1),
    "within a step": ("on_before_optimizer_step", 3),
    "after a step": ("on_train_batch_end", 2),
    "within the last step of an epoch": ("on_after_backward", 4),
    "within a validation": ("on_validation_batch_start", 1),
    "at the end of an epoch": ("on_train_epoch_end", 1),
    "at the start of an epoch": ("on_train_epoch_start", 2),
    "within the last step": ("on_before_zero_grad", 8),
    "after the training": ("on_train_end", 1),
    "when files are written": ("on_fit_end", 1),
    "within the test": ("on_test_batch_start", 1),
}
SOME = ("within a step", "within the last step of an epoch", "within the last step")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder, outside of SLURM."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    model = build(ModelInfo("resnet18", 10, 32, (0.1,) * 3, (0.2,) * 3, 4))
    save_model(model, "suspect.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of a victim that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "log"
    assert run([*VICTIM, "--run", str(folder / "run")], log=log) == 0, log.read_text()
    return folder / "run"


@pytest.fixture
def job(place, monkeypatch):
    """Enters a job; `scontrol` notes what it is told, and ends the job as SLURM does."""

    def enter(ends=True, **more):
        for name, value in (JOB | more).items():
            monkeypatch.setenv(name, value)
        scontrol = place / "bin" / "scontrol"
        scontrol.parent.mkdir(exist_ok=True)
        end = "kill -9 $PPID" if ends else "true"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {place}/asked\n{end}\n')
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)

    return enter


def run(words, moment=None, signum=signal.SIGUSR1, log=Path("log")):
    """Runs a command in a process of its own, which gets a signal at a moment; its status."""
    return forked(lambda: command(words, moment, signum), log)


def command(words, moment=None, signum=signal.SIGUSR1):
    made = BdcleanCLI._own_callbacks
    sends = [Send(*moment, signum)] if moment else []
    BdcleanCLI._own_callbacks = lambda self, config: [*made(self, config), *sends]
    main(words)


def outcome(folder):
    record = json.loads(Path(folder, "result.json").read_text())
    return record["metrics"], record["protocol"], record["cost"]["steps"]


def same(one, other):
    a, b = (load_file(Path(folder, "model.safetensors")) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_requeue(words, moment, job, whole, again=()):
    job()
    assert run([*words, "--run", "job", *again], moment) == -signal.SIGKILL, Path("log").read_text()
    assert Path("asked").read_text() == "requeue 4711\n"
    saved = Path("job", "hpc_ckpt_1.ckpt").is_file()
    assert run([*words, "--run", "job", *again]) == 0, Path("log").read_text()
    assert same(whole, "job")
    assert outcome(whole) == outcome("job")
    assert list(Path("job").glob("hpc_ckpt_*")) == []
    return saved


@pytest.mark.parametrize("moment", SOME)
def test_a_requeued_job_ends_as_if_it_had_not_been(moment, job, whole):
    assert check_requeue(VICTIM, MOMENTS[moment], job, whole)
    metrics, *_ = outcome("job")
    assert {"acc", "asr", "pa", "n_clean", "n_triggered"} <= metrics.keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", MOMENTS)
def test_at_every_moment(moment, job, whole):
    late = moment in ("when files are written", "within the test", "after the training")
    saved = check_requeue(VICTIM, MOMENTS[moment], job, whole, ("--ckpt_path", "last"))
    assert saved != late


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        ("on_before_backward", 2),
        pytest.param(("on_before_backward", 4), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_requeued_defence_ends_with_its_probe(moment, job):
    words = [*CBD, "--model.weights", "suspect.safetensors"]
    assert run([*words, "--run", "whole"]) == 0, Path("log").read_text()
    assert check_requeue(words, moment, job, "whole")
    metrics, protocol, _ = outcome("job")
    assert protocol["finished"]
    assert protocol["head"] == "probe"
    assert metrics.keys() >= {"acc", "asr", "pa"}


@pytest.mark.parametrize("ends", [True, False], ids=["twice", "in vain"])
def test_a_job_that_works_on_tests_its_own_weights(ends, job, place, whole):
    job(ends=ends)
    words = [*VICTIM, "--run", "job"]
    if ends:
        assert run(words, ("on_before_backward", 2)) == -signal.SIGKILL
        assert run(words, ("on_before_backward", 4)) == -signal.SIGKILL
        assert run(words) == 0
    else:
        (place / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $* >> {place}/asked\nexit 3\n")
        assert run(words, ("on_before_backward", 2)) == 0
        told = "The job 4711 cannot be requeued (scontrol: 3), and works on until it is stopped."
        assert told in Path("log").read_text()
    assert Path("asked").read_text() == "requeue 4711\n" * (1 + ends)
    assert same(whole, "job")
    assert outcome(whole) == outcome("job")
    assert list(Path("job").glob("hpc_ckpt_*")) == []


def test_a_test_measures_what_it_is_told(job, place):
    job()
    words = [*VICTIM, "--run", "job"]
    assert run(words, ("on_before_backward", 2)) == -signal.SIGKILL
    assert Path("job", "hpc_ckpt_1.ckpt").is_file()
    test = ["test", *VICTIM[1:], "--model.weights", "suspect.safetensors"]
    assert run([*test, "--run", "job"]) == 0, Path("log").read_text()
    assert run([*test, "--run", "elsewhere"]) == 0
    measured = [json.loads(Path(at, "test.json").read_text()) for at in ("job", "elsewhere")]
    assert measured[0]["metrics"] == measured[1]["metrics"]
    assert measured[0]["cost"]["steps"] == 0
    assert Path("job", "hpc_ckpt_1.ckpt").is_file()


def test_a_test_that_is_requeued_saves_nothing(job, place):
    test = ["test", *VICTIM[1:], "--model.weights", "suspect.safetensors", "--run", "job"]
    job(SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    assert run(test, ("on_test_batch_start", 1)) == -signal.SIGKILL
    assert Path("asked").read_text() == "requeue 12_3\n"
    assert list(Path("job").rglob("*.ckpt")) == []
    assert run(test) == 0
    assert json.loads(Path("job", "test.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_signal_from_outside_in_a_process_as_users_start_it(job, place):
    words = [*VICTIM, "--trainer.max_epochs", "12"]
    whole = "whole"
    assert run([*words, "--run", whole]) == 0, Path("log").read_text()
    job()
    command = [sys.executable, "-m", "bdclean", *words, "--run", "job", "--ckpt_path", "last"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("job", "checkpoints", "last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert Path("job", "hpc_ckpt_1.ckpt").is_file()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert same(whole, "job")
    assert outcome(whole) == outcome("job")


@pytest.mark.slow
def test_devices_save_before_the_same_step(job, place, monkeypatch):
    """The signal reaches the second of two devices alone, and it is the first one that saves."""
    words = [*VICTIM, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    job(SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_NNODES="1", MASTER_ADDR="127.0.0.1")

    def both(folder, moment=None):
        monkeypatch.setenv("MASTER_PORT", str(20_000 + os.getpid() % 20_000 + len(folder)))
        tasks = []
        for rank in (0, 1):
            monkeypatch.setenv("SLURM_PROCID", str(rank))
            monkeypatch.setenv("SLURM_LOCALID", str(rank))
            sent = moment if rank else None
            work = [*words, "--run", folder]
            tasks.append(fork(lambda w=work, s=sent: command(w, s), place / f"log{rank}"))
        return [wait(task) for task in tasks]

    whole = "whole"
    assert both(whole) == [0, 0], (place / "log0").read_text() + (place / "log1").read_text()
    (place / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $* >> {place}/asked\n")
    assert both("works on", ("on_before_backward", 3)) == [0, 0]
    assert Path("asked").read_text() == "requeue 4711\n"
    assert same(whole, "works on")
    assert outcome(whole) == outcome("works on")
