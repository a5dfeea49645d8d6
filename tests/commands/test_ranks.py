"""Two processes of one command end together, with one line, whichever of them is stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

VICTIM = [
    *("fit", "-c", "trainer/ddp_cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"),
    *("-c", "train/supervised/fast", "--model.width", "4", "--trainer.max_epochs", "500"),
    *("--test_after_fit", "false", "--run", "run"),
]
ON = f"This goes on: bdclean {' '.join(VICTIM)} --ckpt_path last"
NOTHING = "Nothing is saved yet; run the same command again."
KILLED = "was killed, as the system does when memory runs out"
# When, the signal, to whom; the status, the line, whether the lock is given back.
CASES = {
    "all, in the training": ("saved", "SIGTERM", "all", 143, f"stopped. {ON}", True),
    "the first, in the training": ("saved", "SIGINT", "first", 130, f"stopped. {ON}", True),
    "all, while the second starts": ("started", "SIGHUP", "all", 129, f"stopped. {NOTHING}", True),
    "the second is killed": (
        "saved",
        "SIGKILL",
        "second",
        137,
        f"process 2 of 2 {KILLED}. {ON}",
        True,
    ),
    "the first is killed": (
        *("saved", "SIGKILL", "first", -9),
        *(f"the first process of the command {KILLED}. {ON}", False),
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ddp,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc"),
]


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts a command in a session of its own, with its output in a file."""
    monkeypatch.chdir(tmp_path)
    begun = []

    def heard():  # a shell's background job ignores Ctrl-C, and its children would too
        for name in ("SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(*words):
        with (tmp_path / "told").open("w") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "bdclean", *words],
                stdout=told,
                stderr=told,
                env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
                preexec_fn=heard,
                start_new_session=True,
            )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def others(first):
    """The living processes of a session besides its first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            words = stat.with_name("cmdline").read_text()
            if fields[3] == str(first) and pid != first and fields[0] != "Z":
                found += [pid] if "bdclean.__main__" in words else []
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines():
    """What bdclean itself has said."""
    return re.findall(r"^bdclean: (.*)$", Path("told").read_text(), re.MULTILINE)


EACH_DAY = ("the second is killed",)
MARKED = [
    pytest.param(case, id=case, marks=() if case in EACH_DAY else pytest.mark.exhaustive)
    for case in CASES
]


@pytest.mark.parametrize("case", MARKED)
def test_all_end_soon_with_one_line(case, begin):
    when, name, to, status, line, unlocked = CASES[case]
    first = begin(*VICTIM)
    last = Path("run/checkpoints/last.ckpt")
    signs = {"saved": last.exists, "started": lambda: others(first.pid)}
    wait_for(lambda: signs[when]() or first.poll() is not None)
    if when == "started":
        time.sleep(1)  # imports, mostly
    receivers = {"all": [-first.pid], "first": [first.pid], "second": others(first.pid)}
    for pid in receivers[to]:
        os.kill(pid, getattr(signal, name))
    first.wait(timeout=30)
    wait_for(lambda: not others(first.pid), 30)
    assert (first.returncode, lines()) == (status, [line]), Path("told").read_text()
    assert Path("run/.lock").exists() != unlocked
    if when == "saved":
        assert torch.load(last, weights_only=True)["global_step"] > 0
    assert "Traceback" not in Path("told").read_text()


def test_a_refusal_is_said_once(begin):
    wrong = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "-1"]
    assert begin(*VICTIM, *wrong).wait(timeout=120) == 2
    assert lines() == ["--model.optimizer: Invalid learning rate: -1.0."]
