"""A command that is stopped ends with one line and the status that shells give."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdclean import stopping
from bdclean.cli import main

VICTIM = [
    *("fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"),
    *("-c", "train/supervised/fast", "--model.width", "4", "--trainer.max_epochs", "500"),
    *("--test_after_fit", "false", "--run", "run"),
]
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
AGAIN = "bdclean: stopped; run the same command again.\n"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def heard():
    """A shell's background job ignores Ctrl-C, and its children would too."""
    for name in STATUS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def begin_anew(*words):
    """Starts Python, imports and all."""
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        preexec_fn=heard,
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def in_memory(process, name):
    """Whether a process has opened a library, and so imports."""
    return lambda: name in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
@pytest.mark.parametrize("name", STATUS)
def test_within_the_imports(name, place):
    process = begin_anew("-m", "bdclean", *VICTIM)
    wait_for(in_memory(process, "torch"), process)
    process.send_signal(getattr(signal, name))
    said, told = process.communicate(timeout=60)
    assert (process.returncode, said, told) == (STATUS[name], "", AGAIN)
    assert list(place.iterdir()) == []


EACH_DAY = {("SIGINT", False), ("SIGTERM", True)}
MOMENTS = [
    pytest.param(
        *(name, saved),
        id=f"{'saved' if saved else 'nothing saved'}-{name}",
        marks=() if (name, saved) in EACH_DAY else pytest.mark.exhaustive,
    )
    for name in STATUS
    for saved in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saved"), MOMENTS)
def test_within_the_training(name, saved, place, begin):
    never = ["--checkpoint.every_n_epochs", "400", "--checkpoint.save_on_train_epoch_end", "true"]
    words = VICTIM if saved else [*VICTIM, *never]
    process = begin("-m", "bdclean", *words)
    sign = place / "run" / ("checkpoints/last.ckpt" if saved else "config.yaml")
    wait_for(sign.exists, process)
    process.send_signal(getattr(signal, name))
    _, told = process.communicate()
    assert process.returncode == STATUS[name]
    assert "Traceback" not in told
    on = f"This goes on: bdclean {' '.join(words)} --ckpt_path last"
    nothing = "Nothing is saved yet; run the same command again."
    assert told.splitlines()[-1] == f"bdclean: stopped. {on if saved else nothing}"
    assert not (place / "run" / ".lock").exists()


SCRIPT = """
import os, signal, sys
import bdclean.cli
from bdclean import stopping
def work(words):
    {}
bdclean.cli._run = work
bdclean.cli.main(["fit"])
"""
KILL = "os.kill(os.getpid(), signal.SIGTERM)"
PLACES = {
    "anywhere": (KILL, 143, AGAIN),
    "a library makes another error of it": (
        f"try: {KILL}\n    except BaseException as e: raise ImportError('odd') from None",
        143,
        AGAIN,
    ),
    "a second one while the first is tidied up": (
        f"try: {KILL}\n    finally: os.kill(os.getpid(), signal.SIGHUP)",
        129,
        AGAIN,
    ),
    "one that the user ignores": (
        "os.kill(os.getpid(), signal.SIGHUP)",
        0,
        "",
    ),
    "while a requeued job is saved": (
        f"def save_and_requeue(): {KILL}\n    save_and_requeue()",
        0,
        "",
    ),
    "in a worker": (
        "pid = os.fork()\n"
        f"    if not pid: {KILL}\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -15)",
        0,
        "",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_wherever_it_comes(case):
    lines, status, told = PLACES[case]
    script = SCRIPT.format(lines)
    if "ignores" in case:
        script = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + script
    process = begin_anew("-c", script)
    assert process.communicate(timeout=60) == ("", told)
    assert process.returncode == status


def test_handlers_are_put_back(monkeypatch):
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    main(["--version"])
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before


@pytest.mark.parametrize("words", [["--version"], VICTIM], ids=["version", "fit"])
def test_a_current_folder_that_was_removed_is_one_sentence(words, place):
    (place / "gone").mkdir()
    script = 'cd gone && rmdir ../gone && exec "$0" "$@"'
    done = subprocess.run(
        ["/bin/sh", "-c", script, sys.executable, "-m", "bdclean", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(stopping.__file__).parents[1])},
    )
    assert done.returncode == 2
    assert done.stderr == "bdclean: the current folder has been removed; go to another one.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("words", [["config", "ls"], ["--help"], ["--version"]])
def test_a_full_disk_behind_the_output_is_one_sentence(words):
    with open("/dev/full", "w") as full:  # noqa: PTH123  (a device)
        done = subprocess.run(
            [sys.executable, "-m", "bdclean", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    message = "bdclean: the standard output cannot be written: No space left on device.\n"
    assert done.stderr == message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_behind_the_messages_changes_no_status():
    with open("/dev/full", "w") as full:  # noqa: PTH123  (a device)
        done = subprocess.run(
            [sys.executable, "-m", "bdclean", "nosuch"], stderr=full, stdout=full, check=False
        )
    assert done.returncode == 2
