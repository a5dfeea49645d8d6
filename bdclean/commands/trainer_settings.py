"""Settings of the Trainer that cannot work here, told before Lightning makes one."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info

from bdclean.commands import hints
from bdclean.commands.making import listed
from bdclean.commands.type_words import either
from bdclean.errors import ConfigError, counted, in_a_sentence
from bdclean.functional.precision import cpu_has_bfloat16

_GPUS = ("gpu", "cuda", "mps")
_LAUNCHED = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)
_PROCESSES = 8  # on a CPU, at most
_FORKS = re.compile("spawn|fork|notebook")
_LEAST = {"min_epochs": 0, "min_steps": 0, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
_CHOICES = {
    "profiler": ["simple", "advanced", "pytorch"],
    "gradient_clip_algorithm": ["norm", "value"],
}
_SHARE = "it must be a share from 0 to 1, as 0.5, or a whole number, 0 or above."


@contextmanager
def in_our_words(settings: Mapping[str, Any], folder: object) -> Iterator[None]:
    """Tells what is wrong with settings of the Trainer that is made within.

    Args:
        settings: Those of the Trainer, by their names.
        folder: Of the run.

    Raises:
        ConfigError: If a setting cannot work, or the folder cannot be written.
    """
    check(settings)
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(of_trainer(str(error), settings)) from error
    except OSError as error:
        raise ConfigError(
            f"--run={folder}: it cannot be written ({error.strerror or error})."
        ) from error


def check(settings: Mapping[str, Any]) -> None:
    """Refuses settings that cannot work on this machine, or with a run of ours.

    Args:
        settings: Those of the Trainer, by their names.

    Raises:
        ConfigError: If there is one.
    """
    for key, why in _WHY.items():
        value = settings.get(key)
        told = None if value is None else why(value, settings)
        if told:
            raise ConfigError(f"--trainer.{key}={_shown(value)}: {told}")


def of_trainer(said: str, settings: Mapping[str, Any]) -> str:
    """What Lightning says of a setting of its Trainer, with the key as users type it.

    Args:
        said: Of any length; the first sentence counts.
        settings: Those of the Trainer.
    """
    first = re.split(r"(?<=[\w)`'\]])\. |\n", said.strip())[0].rstrip(".")
    if "Timer(duration=" in first:
        return f"--trainer.max_time={settings['max_time']}: it must be DD:HH:MM:SS."
    places = {key: found.start() for key in settings if (found := re.search(rf"\b{key}\b", first))}
    if not places:
        return f"trainer: {in_a_sentence(first)}"
    key = min(places, key=lambda each: places[each])
    told = _SHARE if "it has to be in [0.0, 1.0] or an int" in first else in_a_sentence(first)
    near = hints.near_class(str(settings[key]), key)
    meant = f" Did you mean {near}?" * bool(near)
    return f"--trainer.{key}={_shown(settings[key])}: {told}{meant}"


def advise(trainer: Trainer) -> None:
    """Says what is slow on this machine."""
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    if on_cpu and trainer.precision.startswith("bf16") and not cpu_has_bfloat16():
        rank_zero_info(
            "This CPU has no instructions for bfloat16: --trainer.precision 32-true is faster."
        )


# ---------------------------------------------------------------------- why one cannot work


def _accelerator(value: Any, settings: Mapping[str, Any]) -> str | None:
    if not isinstance(value, str):
        return None
    found = AcceleratorRegistry.available_accelerators()
    known = sorted({*found, "auto", "gpu"})
    if value not in known:
        return f"it must be {either(known)}.{_meant(value, known)}"
    names = [name for name in found if name == value or (value == "gpu" and name in _GPUS)]
    if value == "auto" or any(_is_there(name) for name in names):
        return None
    return "torch finds no such device on this machine; take cpu, or auto."


def _is_there(name: str) -> bool:
    return bool(AcceleratorRegistry[name]["accelerator"].is_available())


def _devices(value: Any, settings: Mapping[str, Any]) -> str | None:
    accelerator = settings.get("accelerator") or "auto"
    gpus = torch.cuda.device_count() or int(_is_there("mps"))
    if value == "auto" or accelerator not in ("auto", "cpu", *_GPUS):
        return None
    if accelerator in _GPUS or (accelerator == "auto" and gpus):
        return _of_gpus(value, gpus)
    count, cpus = _whole(value), os.cpu_count() or 1
    if count is None or count < 1:
        return "it must be auto, or the number of processes on the CPU, 1 or above."
    if count > _PROCESSES * cpus:
        return f"this machine has {counted(cpus, 'CPU')}; take {_PROCESSES * cpus} or fewer."
    return None


def _of_gpus(value: Any, gpus: int) -> str | None:
    several = value.strip(",").split(",") if isinstance(value, str) and "," in value else value
    if isinstance(several, list):
        numbers = [_whole(each) for each in several]
        fits = bool(numbers) and len(set(numbers) & set(range(gpus))) == len(numbers)
    else:
        fits = _whole(value) in (-1, *range(1, gpus + 1))
    if fits:
        return None
    there = f"there {'is' if gpus == 1 else 'are'} {gpus}"
    return f"it must be auto, the number of GPUs to use ({there}), or a list of which, as [0]."


def _whole(value: Any) -> int | None:
    """The whole number that a setting gives, as text perhaps."""
    return int(value) if re.fullmatch(r"\s*-?\d{1,9}\s*", str(value)) else None


def _strategy(value: Any, settings: Mapping[str, Any]) -> str | None:
    if not isinstance(value, str):
        return None
    name, known = value.lower(), ["auto", *StrategyRegistry.available_strategies()]
    if _FORKS.search(name) and name in known:
        return "its processes cannot write a run of bdclean; take ddp."
    if name not in known:
        usable = [each for each in known if not re.search(f"{_FORKS.pattern}|xla|tpu|deep", each)]
        near = _meant(name, usable)
        if not near and (kind := hints.near_class(value, "strategy")):
            near = f" Did you mean {kind}?"
        return f"it must be {either(usable)}.{near}"
    if name.startswith("deepspeed") and find_spec("deepspeed") is None:
        return "it needs the package deepspeed, which is not installed; take ddp."
    if name.startswith("fsdp") and not any(map(_is_there, ("cuda", "mps"))):
        return "it needs GPUs, and torch finds none on this machine; take ddp, or auto."
    if re.search("xla|tpu", name) and not _is_there("tpu"):
        return "torch finds no TPU on this machine; take ddp, or auto."
    return None


def _nodes(value: Any, settings: Mapping[str, Any]) -> str | None:
    if value < 1:
        return "it must be 1 or above."
    own = any(isinstance(each, ClusterEnvironment) for each in listed(settings.get("plugins")))
    by_hand = "MASTER_ADDR" in os.environ
    if value == 1 or own or by_hand or any(kind.detect() for kind in _LAUNCHED):
        return None
    return (
        "nothing has started this command on other machines; start it with srun, torchrun or "
        "mpirun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each of them."
    )


def _checkpoints(value: Any, settings: Mapping[str, Any]) -> str | None:
    return (
        None
        if value
        else (
            "a run goes on from its checkpoints; leave it out, or take --checkpoint.save_top_k 0, "
            "which keeps none."
        )
    )


def _bare(value: Any, settings: Mapping[str, Any]) -> str | None:
    return "it takes away what a run consists of, as checkpoints; leave it out." if value else None


def _at_least(least: int) -> Callable[[Any, Mapping[str, Any]], str | None]:
    return lambda value, _: None if value >= least else f"it must be {least} or above."


def _one_of(names: list[str]) -> Callable[[Any, Mapping[str, Any]], str | None]:
    def why(value: Any, settings: Mapping[str, Any]) -> str | None:
        if not isinstance(value, str) or value in names:
            return None
        return f"it must be {either(names)}.{_meant(value, names)}"

    return why


_WHY: dict[str, Callable[[Any, Mapping[str, Any]], str | None]] = {
    "accelerator": _accelerator,
    "devices": _devices,
    "strategy": _strategy,
    "num_nodes": _nodes,
    "enable_checkpointing": _checkpoints,
    "barebones": _bare,
    "fast_dev_run": _at_least(0),
    **{key: _at_least(least) for key, least in _LEAST.items()},
    **{key: _one_of(names) for key, names in _CHOICES.items()},
}
"""What says why a value of a setting cannot work; None where it may."""


def _meant(value: str, known: Iterable[str]) -> str:
    near = get_close_matches(value.lower(), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or repr(value)
