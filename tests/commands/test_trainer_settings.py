"""Settings of the Trainer that cannot work are told in one sentence, before the run folder is."""

import os
from pathlib import Path

import pytest
import torch

from bdclean.cli import main
from bdclean.commands import trainer_settings
from bdclean.commands.trainer_settings import check
from bdclean.errors import ConfigError, counted

pytestmark = pytest.mark.filterwarnings("ignore")
CPUS = os.cpu_count() or 1
NO_DEVICE = "torch finds no such device on this machine; take cpu, or auto."
NUMBER = "it must be auto, or the number of processes on the CPU, 1 or above."
STRATEGIES = (
    "it must be auto, ddp, ddp_find_unused_parameters_false, ddp_find_unused_parameters_true, "
    "fsdp, fsdp_cpu_offload or single_device."
)
FORKS = "its processes cannot write a run of bdclean; take ddp."
WRONG = [
    ("accelerator", "gpu", NO_DEVICE),
    ("accelerator", "cuda", NO_DEVICE),
    ("accelerator", "mps", NO_DEVICE),
    ("accelerator", "tpu", NO_DEVICE),
    ("accelerator", "cup", "it must be auto, cpu, cuda, gpu, mps or tpu. Did you mean cpu?"),
    ("accelerator", "GPU", "it must be auto, cpu, cuda, gpu, mps or tpu. Did you mean gpu?"),
    *(("devices", value, NUMBER) for value in (0, "0", -1, "lots", "1.5", [0], [], "1,2")),
    (
        "devices",
        8 * CPUS + 1,
        f"this machine has {counted(CPUS, 'CPU')}; take {8 * CPUS} or fewer.",
    ),
    ("strategy", "nonsense", STRATEGIES),
    ("strategy", "dpp", f"{STRATEGIES} Did you mean ddp?"),
    ("strategy", "DDPStrateg", f"{STRATEGIES} Did you mean DDPStrategy?"),
    *(("strategy", name, FORKS) for name in ("ddp_spawn", "ddp_fork", "ddp_notebook")),
    ("strategy", "fsdp", "it needs GPUs, and torch finds none on this machine; take ddp, or auto."),
    ("strategy", "xla", "torch finds no TPU on this machine; take ddp, or auto."),
    ("num_nodes", 0, "it must be 1 or above."),
    (
        *("num_nodes", 2),
        "nothing has started this command on other machines; start it with srun, torchrun or "
        "mpirun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each of them.",
    ),
    (
        *("enable_checkpointing", False),
        "a run goes on from its checkpoints; leave it out, or take --checkpoint.save_top_k 0, "
        "which keeps none.",
    ),
    ("barebones", True, "it takes away what a run consists of, as checkpoints; leave it out."),
    ("fast_dev_run", -1, "it must be 0 or above."),
    ("min_epochs", -1, "it must be 0 or above."),
    ("num_sanity_val_steps", -2, "it must be -1 or above."),
    ("profiler", "simpel", "it must be simple, advanced or pytorch. Did you mean simple?"),
    ("gradient_clip_algorithm", "value_", "it must be norm or value. Did you mean value?"),
]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without a GPU, on which nobody has started several processes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(trainer_settings, "_is_there", lambda name: name == "cpu")
    for name in ("MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG, ids=lambda each: str(each)[:20])
def test_what_cannot_work_is_told_with_what_can(key, value, allowed):
    shown = str(value).lower() if isinstance(value, bool) else value
    with pytest.raises(ConfigError) as told:
        check({"accelerator": "cpu"} | {key: value})
    assert str(told.value) == f"--trainer.{key}={shown}: {allowed}"


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator": "auto", "devices": "auto", "strategy": "auto", "num_nodes": 1},
        {"accelerator": "cpu", "devices": "2", "strategy": "ddp"},
        {"accelerator": "cpu", "devices": 1, "strategy": "DDP", "fast_dev_run": True},
        {"profiler": "simple", "gradient_clip_algorithm": "norm", "num_sanity_val_steps": -1},
        {"enable_checkpointing": True, "barebones": False, "min_epochs": 0},
    ],
)
def test_what_works_passes(settings):
    check(settings)


@pytest.mark.parametrize("devices", ["auto", -1, 1, 2, "2", [0, 1], "0,1", "1,"])
def test_gpus_that_are_there(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(trainer_settings, "_is_there", lambda name: name in ("cpu", "cuda"))
    check({"accelerator": "gpu", "devices": devices})


@pytest.mark.parametrize("devices", [0, 3, "99", [2], [0, 0], [], "0,5", "x"])
def test_gpus_that_are_not_there(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(trainer_settings, "_is_there", lambda name: name in ("cpu", "cuda"))
    with pytest.raises(ConfigError, match=r"the number of GPUs to use \(there are 2\), or a list"):
        check({"accelerator": "gpu", "devices": devices})


@pytest.mark.parametrize("variable", ["MASTER_ADDR", "TORCHELASTIC_RUN_ID"])
def test_several_machines_with_a_launcher(variable, monkeypatch):
    for name in (variable, "RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    check({"num_nodes": 2})


FIT = [
    *("fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "train/supervised/fast"),
    *("--model.width", "4", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"),
    *("--test_after_fit", "false"),
]
FAULTS = {
    "devices": ["--trainer.devices", "0"],
    "max_time": ["--trainer.max_time", "soon"],
    "num_nodes": ["--trainer.num_nodes", "0", "--seed_everything", "3"],
}


def test_what_is_wrong_with_a_command_comes_before_the_folder(tmp_path, monkeypatch, capsys):
    """Without --run, an earlier run lies in the folder, of which nobody has spoken."""
    monkeypatch.chdir(tmp_path)
    main(FIT)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "No --run is given: this run writes into runs/victim."
    assert told[1].startswith("Written to runs/victim: ")
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    for key, words in FAULTS.items():
        with pytest.raises(SystemExit, match="2"):
            main([*FIT, *words])
        assert capsys.readouterr().err.startswith(f"bdclean: --trainer.{key}={words[1]}: it ")
    with pytest.raises(SystemExit, match="2"):
        main([*FIT, "--seed_everything", "3"])
    assert "runs/victim/config.yaml belongs to a run with another" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert after == before
