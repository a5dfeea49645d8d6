"""Our entry in a checkpoint, and what is said of one that cannot be used."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lightning import Trainer
from torch import Tensor

from bdclean.errors import BdcleanError, ConfigError, WeightsError, behind, in_words

RECORD = "bdclean"
# What a checkpoint of Lightning consists of; a fit cannot go on without any of it.
_PARTS: dict[str, type[Any]] = {
    "epoch": int,
    "global_step": int,
    "state_dict": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_OF_GROUPS = ("loops", "callbacks")  # each of their values is a mapping as well
# What `StagedModule` keeps in our entry, and `Stage.outline` in its plan.
_KEPT: dict[str, Callable[[Any], bool]] = {
    "networks": lambda value: isinstance(value, Mapping) and all(map(_is_text, value.values())),
    "plan": lambda value: isinstance(value, list | tuple) and all(map(_is_outline, value)),
    "stage": lambda value: type(value) is int and value >= 0,
    "steps": lambda value: type(value) is int and value >= 0,
    "results": lambda value: isinstance(value, Mapping) and all(map(_is_result, value.items())),
}
_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")
_OF_REQUEUE = "hpc_ckpt_"  # Lightning finds such a file by itself
_READER = "checkpoint_connector.py"
_VERSION = "pytorch-lightning_version"
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, WeightsError)


def named(path: str | os.PathLike[str] | None) -> str:
    """What a user calls a checkpoint: the option with its value, or a file that nobody typed."""
    if path is None:
        return "--ckpt_path"
    return str(path) if Path(path).name.startswith(_OF_REQUEUE) else f"--ckpt_path {path}"


def named_checkpoint(trainer: Trainer | None) -> str:
    """The option and the file of the checkpoint that is read, as the user types them."""
    return named(None if trainer is None else trainer.ckpt_path)


def check_there(path: str | os.PathLike[str]) -> None:
    """Refuses what is no file of this machine; Lightning would unpickle what a URL gives.

    Raises:
        ConfigError: If it is none.
    """
    file = named(path)
    if os.path.isdir(path):  # noqa: PTH112  (of any length)
        raise ConfigError(
            f"{file}: it is a folder; give the file, as checkpoints/last.ckpt of a run."
            if file != str(path)
            else f"{file}: it is a folder where the checkpoint of a requeued job belongs; move it."
        )
    if not os.path.isfile(path):  # noqa: PTH113
        raise ConfigError(f"{file}: there is no such file on this machine.")


def check_parts(checkpoint: Any, file: str) -> None:
    """Refuses a file that is no checkpoint of Lightning, or has parts of an odd type.

    Args:
        checkpoint: As torch has read it.
        file: What the user calls it.

    Raises:
        ConfigError: If it is.
    """
    if not isinstance(checkpoint, Mapping) or _VERSION not in checkpoint:
        raise ConfigError(
            f"{file} is no checkpoint of a run; give a weights file as --model.weights."
        )
    version, odd = checkpoint[_VERSION], None
    if not isinstance(version, str) or not re.match(r"\d+(\.\d+)*", version):
        odd = _VERSION
    for part, kind in _PARTS.items():
        value = checkpoint.get(part)
        fits = isinstance(value, kind) or value is None
        if fits and value and part in _OF_GROUPS:
            fits = all(isinstance(each, Mapping | None) for each in value.values())
        odd = odd if fits else part
    if odd is not None:
        raise ConfigError(f"{file}: {none_of_ours(f'its entry {odd} is of a wrong type')}")
    for name, state in (checkpoint.get("callbacks") or {}).items():
        if (place := _odd_file(state or {})) is not None:
            raise ConfigError(
                f"{file}: {none_of_ours(f'the entry {name} of its callbacks has an odd {place}')}"
            )


def _odd_file(state: Mapping[Any, Any]) -> str | None:
    """The entry of a ModelCheckpoint that names no file of a folder of checkpoints.

    Lightning removes the files that stand there when it has written newer ones.
    """
    paths = {key: [state[key]] for key in _PATHS if state.get(key) is not None}
    models = state.get("best_k_models")
    if models is not None and not isinstance(models, Mapping):
        return "best_k_models"
    paths["best_k_models"] = list(models or {})
    for key, values in paths.items():
        if not all(isinstance(value, str) and _is_plain(value) for value in values):
            return key
    return None


def _is_plain(path: str) -> bool:
    return "://" not in path and ".." not in Path(path).parts and "\0" not in path


def check_complete(checkpoint: Mapping[str, Any], file: str, *, goes_on: bool) -> None:
    """Refuses a checkpoint that lacks a part.

    Args:
        checkpoint: As Lightning has read it.
        file: What the user calls it.
        goes_on: Whether a fit is to go on from it, which takes more than weights.

    Raises:
        ConfigError: If it does.
    """
    wanted = _PARTS if goes_on else ("state_dict",)
    missing = next((part for part in wanted if checkpoint.get(part) is None), None)
    if missing is not None:
        raise ConfigError(f"{file}: {none_of_ours(f'its entry {missing} is missing')}")


def odd_state(error: BaseException, file: str) -> ConfigError | None:
    """What to say of an error within Lightning's reading of a checkpoint; None of another one."""
    if behind(error, BdcleanError) is not None or not isinstance(error, Exception):
        return None
    frames = (frame.f_code for frame, _ in walk_tb(error.__traceback__))
    if any(code.co_filename.endswith(_READER) and "restore" in code.co_name for code in frames):
        why = f"its state is odd ({type(error).__name__}: {in_words(error)})"
        return ConfigError(f"{file}: {none_of_ours(why)}")
    return None


def none_of_ours(why: str) -> str:
    """The rest of a sentence on a checkpoint that cannot be used."""
    return (
        f"{why}, so it is no whole checkpoint of a run of bdclean; take another one, or start a "
        "new run."
    )


def record_of(checkpoint: Mapping[str, Any], method: str, file: str) -> dict[str, Any]:
    """Our entry.

    Args:
        checkpoint: As Lightning has read it.
        method: The name of the one that is to go on.
        file: What the user calls it.

    Raises:
        ConfigError: If the checkpoint is of another method, or of an earlier version.
    """
    record = checkpoint.get(RECORD)
    if not isinstance(record, dict):
        raise ConfigError(
            f"{file}: the checkpoint is of an earlier version of bdclean, or not of a run of "
            "bdclean; start a new run. A model to start from comes in through --model.weights, "
            "where a method takes one."
        )
    if record.get("method") != method:
        raise ConfigError(
            f"{file}: the checkpoint was written by {record.get('method')}, and this is {method}. "
            "A model to start from comes in through --model.weights, where a method takes one."
        )
    for part, fits in _KEPT.items():
        if part in record and not fits(record[part]):
            raise ConfigError(
                f"{file}: {none_of_ours(f'its entry {RECORD}.{part} is of a wrong type')}"
            )
    return record


def _is_text(metadata: object) -> bool:
    if not isinstance(metadata, Mapping):
        return False
    return all(isinstance(part, str) for pair in metadata.items() for part in pair)


def _is_outline(stage: object) -> bool:
    if not isinstance(stage, list | tuple) or len(stage) != 2:
        return False
    return isinstance(stage[0], str) and type(stage[1]) is int


def _is_result(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


@contextmanager
def telling_damage(file: str) -> Iterator[None]:
    """Says in one sentence what an entry of odd content makes fail within the block.

    Raises:
        ConfigError: If something does.
    """
    try:
        yield
    except _DAMAGE as error:
        kind = "" if isinstance(error, BdcleanError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"{file}: the checkpoint is damaged, or of another version of bdclean "
            f"({kind}{in_words(error)}); start a new run."
        ) from error
