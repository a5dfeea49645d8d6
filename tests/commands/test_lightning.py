"""What a fit prints, how it is stopped, and what it does in a folder that is in use."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.cli import main
from bdclean.commands import closing
from bdclean.commands.quick_import import told_if_slow

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = ["-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"]
VICTIM = [*BASE, "-c", "train/supervised/fast", "--model.width", "4"]
NOISE = (
    *("Tip", "litlogger", "FLOPs", "Params", "log_every_n_steps", "max_epochs", "DataLoader 0"),
    *("eval mode", "num_workers", "GPU available", "Seed set", "┏"),
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_a_process(*words):
    """Starts the command as a user does; gives the process."""
    return subprocess.Popen(
        [sys.executable, "-m", "bdclean", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"},
        # A shell's background job ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_a_fit_says_what_it_did_and_no_more(place):
    process = in_a_process("fit", *VICTIM, "--trainer.max_epochs", "1", "--run", "runs/victim")
    said, noise = process.communicate(timeout=240)
    assert process.returncode == 0, noise
    lines = said.splitlines()
    assert lines[0] == "Written to runs/victim: model.safetensors, result.json"
    assert lines[1] == "Measured on test images:"
    assert [line.split()[0] for line in lines[2:5]] == ["ACC", "ASR", "PA"]
    assert " % of 397, clean" in lines[2]
    assert " % of 361 with the trigger of BadNets" in lines[3]
    assert lines[5].startswith("Next: bdclean fit -c runs/victim/config.yaml -c purify/cbd/digits ")
    assert len(lines) == 6
    told = noise.splitlines()
    assert told[-1].startswith("epoch 1/1  loss ")
    assert len(told) <= 2  # a CPU without bfloat16 is told
    assert not [word for word in NOISE if word in said + noise]


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_the_same_fit_is_refused(place, begin, capsys):
    words = [*VICTIM, "--trainer.max_epochs", "500", "--run", "my run", "--test-after-fit=false"]
    process = begin("-m", "bdclean", "fit", *words)
    checkpoint = place / "my run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    on = " ".join(words).replace("my run", "'my run'")
    assert told.splitlines()[-1] == (
        f"bdclean: stopped. This goes on: bdclean fit {on} --ckpt_path last"
    )
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "bdclean: my run holds this run, unfinished. Add --ckpt_path last to go on with it, or "
        "choose another folder with --run.\n"
    )
    assert checkpoint.read_bytes() == before


def test_where_it_runs_does_not_make_another_run(capsys):
    words = ["fit", *VICTIM, "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    main([*words, "--run", "run"])
    with pytest.raises(SystemExit):
        main([*words, "--run", "run", "--trainer.accelerator", "auto"])
    ended = "bdclean: run holds this run, and it has ended. Choose another folder with --run, or "
    assert capsys.readouterr().err.endswith(f"{ended}delete that one.\n")
    with pytest.raises(SystemExit):
        main([*words, "--run", "run", "--seed_everything", "1"])
    assert "belongs to a run with another config" in capsys.readouterr().err


def test_a_fit_without_checkpoint_may_start_again():
    words = ["fit", *VICTIM, "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    words += ["--run", "run", "--test_after_fit", "false"]
    main(words)
    for left in ("result.json", "checkpoints/last.ckpt"):
        Path("run", left).unlink()
    main(words)


def test_users_can_switch_on_what_is_off(capsys):
    words = ["fit", *VICTIM, "--trainer.fast_dev_run", "true", "--trainer.enable_model_summary"]
    main([*words, "true"])
    assert "Params" in capsys.readouterr().out
    main([*words, "false"])
    assert capsys.readouterr().out == closing.TRIAL + "\n"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluations_say_what_they_measured(command, capsys):
    save_model(build(ModelInfo("resnet18", 10, 32, (0.1,) * 3, (0.2,) * 3, 4)), "net.safetensors")
    weights = ["--model.weights", "net.safetensors"]
    words = [command, *VICTIM, "--data.splits.val", "50", "--run", "run"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "Supervised has not been trained, and there are no weights" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--ckpt_path", "last"])
    assert "--ckpt_path last: run holds no checkpoint." in capsys.readouterr().err
    main([*words, *weights])
    lines = capsys.readouterr().out.splitlines()
    if command == "validate":
        assert lines[0] == "Measured on held-out training images:"
        assert " % of 50, clean" in lines[1]
    else:
        assert lines[:2] == ["Written to run: test.json", "Measured on test images:"]
        assert lines[-1].startswith("Next: bdclean predict -c trainer/cpu")


def test_what_is_not_measured_has_its_reason(capsys):
    words = ["fit", *VICTIM, "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    main([*words, "--run", "a", "--test_after_fit", "false"])
    assert "Nothing was measured, because --test_after_fit is false." in capsys.readouterr().out
    place = words.index("attack/badnets/cbd")
    clean = words[: place - 1] + words[place + 1 :]
    main([*clean, "--run", "b"])
    said = capsys.readouterr().out
    assert "Not measured: ASR and PA, because the data has no attack." in said
    assert "Next: bdclean predict --run b\n" in said


def test_the_first_start_of_a_job_that_is_requeued_begins(capsys):
    words = ["fit", *VICTIM, "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    main([*words, "--run", "job", "--ckpt_path", "last", "--test_after_fit", "false"])
    said = capsys.readouterr()
    assert "There is no checkpoint in job yet, so the fit starts from scratch." in said.out
    assert "HINT" not in said.err


def test_a_timer_of_lightning_is_taken(capsys):
    words = ["fit", *VICTIM, "--trainer.callbacks+", "Timer", "--run", "timed"]
    words += ["--trainer.callbacks.duration", "00:00:00:00", "--test_after_fit", "false"]
    main(words)
    assert "interval: step" in Path("timed/config.yaml").read_text()
    main(["fit", "-c", "timed/config.yaml", "--run", "again"])
    assert "Written to again: model.safetensors, result.json" in capsys.readouterr().out


def test_imports_that_take_long_are_told_to_a_terminal(monkeypatch, capsys):
    with told_if_slow(0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with told_if_slow(30):
        pass
    assert capsys.readouterr().err == ""
    with told_if_slow(0):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("bdclean: loading torch and Lightning, ")
