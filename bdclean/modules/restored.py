"""What a checkpoint would restore, compared with what a new run has, before anything is."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning import Trainer
from torch import Tensor

from bdclean.backbones import ModelInfo, SplitModel, build_for
from bdclean.errors import ConfigError
from bdclean.modules.checkpoints import none_of_ours
from bdclean.modules.trainer import counted_steps, loaded_checkpoint, loop_state

# Of optimizers: what has the shape of its parameter.
_LIKE_PARAMETERS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_PHASES = ("ready", "started", "processed", "completed")  # of a batch, a step or an epoch
_COUNTS = frozenset({"last_epoch", "_step_count"})  # of schedulers
_LARGEST_COUNT = 2**53


def networks_of(record: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, SplitModel]:
    """The networks of a checkpoint, freshly initialised.

    Args:
        record: Our entry.
        state: The weights of all networks; each must fit before a network is built, so that
            none is larger than they are.

    Raises:
        WeightsError: If an entry describes no network, or not that of the weights.
    """
    infos = {n: ModelInfo.from_metadata(metadata) for n, metadata in record["networks"].items()}
    made = {}
    for name, info in infos.items():
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in state.items()
            if isinstance(key, str) and key.startswith(f"{name}.") and isinstance(value, Tensor)
        }
        made[name] = build_for(info, own, f"its network {name}")
    return made


def check_state(trainer: Trainer, file: str) -> None:
    """Refuses a checkpoint whose loops, optimizers or schedulers are not those of the fit.

    Called when these are there, and before Lightning restores them.

    Args:
        trainer: Of the fit that goes on.
        file: What the user calls the checkpoint.

    Raises:
        ConfigError: If one is of another form.
    """
    checkpoint = loaded_checkpoint(trainer)
    if checkpoint is None:
        return
    odd = odd_part(loop_state(trainer), checkpoint["loops"], "loops", whole=True)
    odd = odd or _odd_count(checkpoint["loops"], "loops")
    if odd is None and counted_steps(checkpoint["loops"]) != checkpoint["global_step"]:
        odd = "global_step"
    odd = odd or _odd_optimizer(trainer, checkpoint["optimizer_states"])
    odd = odd or _odd_scheduler(trainer, checkpoint["lr_schedulers"])
    if odd is not None:
        raise ConfigError(f"{file}: {none_of_ours(f'its entry {odd} is odd or missing')}")


def _odd_count(loops: Mapping[str, Any], key: str) -> str | None:
    """The first count of a loop in which more has ended than has begun."""
    counts = [(phase, loops[phase]) for phase in _PHASES if phase in loops]
    for (_, before), (phase, after) in pairwise(counts):
        if after > before:
            return f"{key}.{phase}"
    odds = (_odd_count(v, f"{key}.{k}") for k, v in loops.items() if isinstance(v, Mapping))
    return next((odd for odd in odds if odd is not None), None)


def _odd_optimizer(trainer: Trainer, states: Sequence[Any]) -> str | None:
    if len(states) != len(trainer.optimizers):
        return "optimizer_states"
    for number, (optimizer, state) in enumerate(zip(trainer.optimizers, states, strict=True)):
        key = f"optimizer_states.{number}"
        expected = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
        if (odd := odd_part(expected, state, key, whole=False)) is not None:
            return odd
        if not {"state", "param_groups"} <= state.keys():
            return key
        groups = zip(expected["param_groups"], state["param_groups"], strict=True)
        for place, (own, group) in enumerate(groups):
            if not {"lr", "params"} <= group.keys():
                return f"{key}.param_groups"
            # Numbers from 0 on, as torch gives them: by these, parameters find their momentum.
            if repr([*group["params"]]) != repr(own["params"]):
                return f"{key}.param_groups.{place}.params"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for place, entry in state["state"].items():
            fits = isinstance(entry, Mapping)
            if type(place) is int and not 0 <= place < len(parameters):
                return f"{key}.state.{place}"
            if fits and type(place) is int:
                likes = [entry[name] for name in _LIKE_PARAMETERS if entry.get(name) is not None]
                shape = parameters[place].shape
                fits = all(isinstance(like, Tensor) and like.shape == shape for like in likes)
            if not fits:
                return f"{key}.state.{place}"
    return None


def _odd_scheduler(trainer: Trainer, states: Sequence[Any]) -> str | None:
    configs = trainer.lr_scheduler_configs
    if len(states) != len(configs):
        return "lr_schedulers"
    for number, (config, state) in enumerate(zip(configs, states, strict=True)):
        key, expected = f"lr_schedulers.{number}", config.scheduler.state_dict()
        if (odd := odd_part(expected, state, key, whole=False)) is not None:
            return odd
        for name in _COUNTS.intersection(expected):
            if not _is_count(state.get(name)):
                return f"{key}.{name}"
        for name in state.keys() - expected.keys():
            if hasattr(config.scheduler, str(name)):  # it would hide a method
                return f"{key}.{name}"
    return None


class Results(dict[str, Tensor]):
    """What stages have computed before a run was stopped.

    Args:
        results: By their names.
        file: What the user calls the checkpoint.
    """

    def __init__(self, results: Mapping[str, Tensor], file: str) -> None:
        super().__init__(results)
        self._file = file

    def __missing__(self, name: str) -> Tensor:
        """Refuses to go on without.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self._file}: {none_of_ours(f'its results lack {name}')}")


def odd_part(expected: Any, found: Any, key: str, *, whole: bool) -> str | None:
    """The first part of a state that is of another form than it would be in a new run.

    Args:
        expected: The state of a new run.
        found: That of a checkpoint.
        key: What both are called.
        whole: Whether nothing may be missing, and numbers are counts.

    Returns:
        Its key; None if all fits.
    """
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return key
        for name, value in expected.items():
            if name not in found:
                odd = f"{key}.{name}" if whole else None
            else:
                odd = odd_part(value, found[name], f"{key}.{name}", whole=whole)
            if odd is not None:
                return odd
        return None
    if isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return key
        pairs = enumerate(zip(expected, found, strict=True))
        odds = (odd_part(a, b, f"{key}.{number}", whole=whole) for number, (a, b) in pairs)
        return next((odd for odd in odds if odd is not None), None)
    return None if _is_alike(expected, found, whole) else key


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def _is_alike(expected: Any, found: Any, counts: bool) -> bool:
    if isinstance(expected, bool | str):
        return type(found) is type(expected)
    if counts and isinstance(expected, int):
        return _is_count(found)
    if isinstance(expected, int | float | Tensor):
        if isinstance(found, Tensor):
            return found.numel() == 1 or found.shape == getattr(expected, "shape", None)
        fits = isinstance(found, int | float) and not isinstance(found, bool)
        return fits and (found >= 0 or not counts)
    return not isinstance(found, Mapping | Sequence | Tensor) or isinstance(found, str)
