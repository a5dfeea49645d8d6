"""A run that was killed and is started again ends with the weights it would have had."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdclean.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
ATTEMPT_SECONDS = 120


def command(run, method, *extra):
    stack = ["trainer/cpu", "data/digits", "attack/badnets/cbd", method]
    words = [w for name in stack for w in ("-c", str(CONFIGS / f"{name}.yaml"))]
    return ["fit", *words, "--run", str(run), "--test_after_fit", "false", *extra]


def kill_after_checkpoint(process, checkpoint, how):
    """Kills a command once it has written."""
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while not checkpoint.exists():
        assert process.poll() is None, "ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    process.send_signal(how)
    # Python ends by SIGKILL at once; of SIGTERM the command makes the status that shells give
    assert process.wait() == (-how if how == signal.SIGKILL else 128 + how)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "extra", "how"),
    [
        pytest.param(
            "train/supervised/fast",
            ["--model.width", "4", "--trainer.max_epochs", "4"],
            signal.SIGKILL,
            marks=pytest.mark.exhaustive,
        ),
        (
            "train/supervised/fast",
            [
                "--model.width",
                "4",
                "--trainer.max_epochs",
                "2",
                "--model.batch_size",
                "32",
                "--checkpoint.every_n_train_steps",
                "7",
            ],
            signal.SIGTERM,
        ),
        pytest.param(
            "train/simclr/fast",
            [
                *("--model.width", "4", "--trainer.max_epochs", "3", "--model.batch_size", "64"),
                *("--checkpoint.every_n_train_steps", "7"),
            ],
            signal.SIGKILL,
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "train/supervised/fast",
            [
                *("--model.width", "4", "--trainer.max_steps", "37", "--trainer.max_epochs", "-1"),
                *("--trainer.limit_train_batches", "7", "--trainer.accumulate_grad_batches", "2"),
                *("--data.splits.val", "40", "--data.validate_in_fit", "true"),
                *("--trainer.val_check_interval", "3", "--checkpoint.every_n_train_steps", "3"),
            ],
            signal.SIGKILL,
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["at an epoch's end", "within an epoch", "contrastive, within an epoch", "under limits"],
)
def test_killed_and_restarted_equals_uninterrupted(tmp_path, begin, method, extra, how):
    main(command(tmp_path / "whole", method, *extra))
    words = command(tmp_path / "killed", method, *extra)
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    kill_after_checkpoint(begin("-m", "bdclean", *words), checkpoint, how)
    done = torch.load(checkpoint, weights_only=True)["global_step"]
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "finished before the kill"
    if how == signal.SIGTERM:  # what Lightning writes before SLURM requeues a job is newer
        checkpoint.rename(tmp_path / "killed" / "hpc_ckpt_1.ckpt")
        checkpoint.write_bytes(b"of an earlier epoch")
        os.utime(checkpoint, (1, 1))
    main([*words, "--ckpt_path", "last"])
    whole, killed = (load_file(tmp_path / r / "model.safetensors") for r in ("whole", "killed"))
    assert done > 0
    assert whole.keys() == killed.keys()
    assert [k for k in whole if not torch.equal(whole[k], killed[k])] == []
