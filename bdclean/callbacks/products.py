"""What lies in a run folder before a command writes there: what must not be lost, or is in the way.

A command replaces files of its own run and no others.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch.nn.parameter import is_lazy

from bdclean.errors import ConfigError, DataError
from bdclean.files import write_bytes
from bdclean.printable import printable
from bdclean.runs import LAST, RunFolder, read_record, weights_files

OF_FIT = (
    *("model.safetensors", "result.json", "metrics.csv"),
    *("plan.json", "plan.safetensors", "trigger.safetensors"),
    *("suspects.csv", "suspects.png", "scores.png", "rounds.png"),
    # networks that methods keep on the way
    *("suspect.safetensors", "enhanced.safetensors", "before_relabelling.safetensors"),
    "backdoored.safetensors",
)
"""Files that a fit writes beside its config and checkpoints."""
_OF_OTHERS = ("config.yaml", "test.json", "predictions-clean.safetensors")
_NOTES = (
    *(".out", ".err", ".log", ".txt", ".md"),
    *(".yaml", ".yml", ".sh", ".sbatch", ".slurm"),
)
"""Ends of files that people put into a run folder before the run: logs, notes, configs, scripts."""
_LOGS = ("lightning_logs", "wandb", "mlruns")
"""Folders of loggers, which write before a fit has its config."""


def products(run: RunFolder) -> Iterator[Path]:
    """What a fit has written, or would write over, but for its config."""
    yield from (run.path / name for name in OF_FIT if os.path.lexists(run.path / name))
    yield from run.path.glob("hpc_ckpt_*.ckpt")
    yield from run.checkpoints.glob("[!.]*")  # a killed command leaves hidden files


def is_barren(run: RunFolder) -> bool:
    """Whether a fit of ours began here, and ended before it had anything but losses to keep."""
    return run.is_run and all(file == run.metrics for file in products(run))


def stranger(run: RunFolder) -> Path | None:
    """What lies there that no run leaves, and no user puts there for one; None without such a file.

    Args:
        run: The folder; it need not exist.
    """
    if not run.path.is_dir():
        return None
    return next((each for each in sorted(run.path.iterdir()) if not _is_note(each)), None)


def _is_note(file: Path) -> bool:
    if file.name.startswith("."):
        return True
    if file.is_dir():
        return file.name in _LOGS or (file.name == "checkpoints" and not any(file.glob("[!.]*")))
    of_evaluations = file.name == "test.json" or file.match("predictions-*.safetensors")
    return of_evaluations or file.suffix in _NOTES


def clear(run: RunFolder) -> None:
    """Removes the settings and losses of a fit that left nothing else."""
    for file in (*run.configs(), *run.logs()):
        file.unlink()


# ---------------------------------------------------------------------- refusals


def require_files(run: RunFolder, command: str) -> None:
    """Refuses a folder in which something else lies where a command writes a file.

    Args:
        run: The folder.
        command: `fit`, `validate`, `test` or `predict`.

    Raises:
        ConfigError: If it does: a folder, a link to nowhere, a device ..., or somebody's test.json.
    """
    files = [run.path / name for name in (*OF_FIT, *_OF_OTHERS)]
    for file in (*files, run.last_checkpoint, *run.path.glob("predictions-*.safetensors")):
        if os.path.lexists(file) and not file.is_file():
            raise ConfigError(_in_the_way(file, "file"))
    if os.path.lexists(run.checkpoints) and not run.checkpoints.is_dir():
        raise ConfigError(_in_the_way(run.checkpoints, "folder"))
    if command == "test" and run.test_record.is_file() and not _is_record(run.test_record):
        raise ConfigError(
            f"--run {run.path}: its test.json is no record of bdclean; name another folder."
        )


def foreign(run: RunFolder, checkpoint: str | None) -> str | None:
    """Why a fit may not write into a folder that no fit of ours has written; None if it may.

    Args:
        run: The folder.
        checkpoint: From which the fit goes on; one that lies there makes the folder its own.
    """
    if run.config.is_file() or _lies_in(checkpoint, run):
        return None
    if file := next(products(run), None):
        return (
            f"--run {run.path}: it holds {_name(file, run)}, but no config.yaml of a run, and a "
            "fit writes files of such names; name a new or empty folder."
        )
    if file := stranger(run):
        return (
            f"--run {run.path}: it holds {_name(file, run)}, but no config.yaml of a run; name a "
            "new or empty folder."
        )
    return None


def overwritten(run: RunFolder, config: Mapping[str, Any]) -> str | None:
    """Why a fit would destroy a file that it reads; None if it does not.

    Args:
        run: Where it writes.
        config: Of the fit.
    """
    for key, name in weights_files(config).items():
        file = Path(os.path.realpath(Path(name).expanduser()))
        written = (*(run.path / each for each in OF_FIT), run.last_checkpoint)
        if any(file == Path(os.path.realpath(each)) for each in written):
            return f"--{key} {name}: this run would write over it; name another folder with --run."
    return None


def too_full(run: RunFolder, module: LightningModule) -> str | None:
    """Why the disk could not take the result; None if it may.

    Args:
        run: Where it goes.
        module: Whose parameters are trained; the result has at least as many.
    """
    trained = [p for p in module.parameters() if p.requires_grad and not is_lazy(p)]
    needed = sum(p.numel() * p.element_size() for p in trained)
    place = next(folder for folder in (run.path, *run.path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free >= needed:
        return None
    return (
        f"--run {run.path}: {free / 2**20:.1f} MiB are free there, and the result takes at least "
        f"{needed / 2**20:.1f} MiB; make room, or name another folder."
    )


def require_writable(run: RunFolder) -> None:
    """Writes a file where checkpoints go, and removes it; the folder is there already, or made.

    Raises:
        FileError: If it cannot be written.
    """
    if run.checkpoints.exists():
        probe = run.checkpoints / ".probe"
        write_bytes(probe, b"")
        probe.unlink()


def _name(file: Path, run: RunFolder) -> str:
    return printable(file.relative_to(run.path))


def _lies_in(checkpoint: str | None, run: RunFolder) -> bool:
    if checkpoint is None:
        return False
    if checkpoint == LAST:
        return run.newest_checkpoint() is not None
    return run.path.resolve() in Path(checkpoint).resolve().parents


def _is_record(file: Path) -> bool:
    try:
        return "metrics" in read_record(file)
    except DataError:
        return False


def _in_the_way(place: Path, kind: str) -> str:
    is_what = "a link to nowhere" if place.is_symlink() and not place.exists() else f"no {kind}"
    return (
        f"{place} is {is_what}, and this command writes a {kind} of that name; move it away, or "
        "name another folder with --run."
    )
