"""Makes the objects of a command, those of users' own classes among them."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, _InstantiatorFn

from bdclean.attacks import Attack
from bdclean.commands.parsing import OneDialect
from bdclean.commands.rooms import find_class
from bdclean.data.datamodule import ImageDataModule
from bdclean.errors import BdcleanError, ConfigError, behind, in_a_sentence
from bdclean.modules import BackdoorModule, StagedModule, Training

# What the __init__ of each class leaves behind.
_MARKS = {
    LightningModule: "_modules",
    BackdoorModule: "_counts",
    StagedModule: "_before",
    Training: "_steps_before",
    LightningDataModule: "prepare_data_per_node",
    ImageDataModule: "shuffle_seed",
    Attack: "quantize",
}
_UNKNOWN = re.compile(r"\.__init__\(\) got an unexpected keyword argument '(\w+)'")


# Members of an enumeration of texts are texts, in a config as well; PyYAML knows plain ones alone.
yaml.SafeDumper.add_multi_representer(
    str, lambda dumper, text: dumper.represent_str(str.__str__(text))
)


class LightningParser(OneDialect, LightningArgumentParser):  # type: ignore[misc]
    """The parser of the commands of Lightning."""


class Maker(_InstantiatorFn):
    """Makes models and data modules as Lightning does, and models that take no facts as well."""

    def __call__(
        self,
        class_type: type[Any],
        *args: Any,
        applied_instantiation_links: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """Makes one; a link whose target the class does not have is none.

        Raises:
            ConfigError: If the class does not begin with the `__init__` of the one above.
        """
        links = applied_instantiation_links if "facts" in kwargs else {}
        try:
            made = super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)
        except AttributeError as error:
            if "before Module.__init__() call" not in str(error):
                raise
            raise _unfinished(class_type) from error
        return finished(made)


def make_attack(class_type: type[Any], *args: Any, **kwargs: Any) -> Any:
    """Makes an attack.

    Raises:
        ConfigError: If the class does not begin with the `__init__` of the one above.
    """
    return finished(class_type(*args, **kwargs))


def finished(made: Any) -> Any:
    """What was made, if its class has called the `__init__` of those above.

    Raises:
        ConfigError: If it has not.
    """
    for kind, mark in _MARKS.items():
        if isinstance(made, kind) and mark not in vars(made):
            raise _unfinished(type(made))
    return made


def refusal(error: Exception, config: Mapping[str, Any]) -> ConfigError | None:
    """What to say of objects that could not be made; None of an error that is not the user's.

    Args:
        error: As jsonargparse has raised it.
        config: What they were to be made of; see `untouched`.
    """
    if behind(error, BdcleanError) is not None:
        return None
    if refused := behind(error, MisconfigurationException):
        return ConfigError(of_setting(str(refused), config))
    missing = behind(error, ImportError)
    if missing is not None:
        return ConfigError(f"A package is missing. {in_a_sentence(missing)}")
    if unknown := _UNKNOWN.search(str(error)):
        for key, name, arguments in _loose(config, ""):
            if unknown[1] in arguments:
                return ConfigError(f"--{key}.{unknown[1]}: {name} takes no such argument.")
    model = config.get("model") or {}
    kind = find_class(model.get("class_path", ""))
    facts = inspect.signature(kind).parameters.get("facts") if inspect.isclass(kind) else None
    if facts is not None and facts.annotation is facts.empty:
        return ConfigError(
            f"{kind.__name__}: annotate its argument facts with bdclean.types.ImageFacts, as in "
            "`def __init__(self, facts: ImageFacts)`."
        )
    return None


def of_lightning(error: BaseException) -> str | None:
    """What Lightning says while it runs, in one sentence; None of an error that is not the user's.

    Args:
        error: Its own, or one that it caused.
    """
    missing = behind(error, ModuleNotFoundError)
    if missing is not None:
        return f"A package is missing. {in_a_sentence(missing)}"
    refused = behind(error, MisconfigurationException)
    if refused is not None:
        of_callback = re.search(r"`\w+` callback", str(refused))
        return f"{'--trainer.callbacks: ' * bool(of_callback)}{in_a_sentence(refused)}"
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on"):
        return f"--trainer.callbacks: {in_a_sentence(error)}"
    return None


def of_setting(said: str, config: Any) -> str:
    """What Lightning says of an argument of a class, with the key as users type it.

    Args:
        said: Of any length.
        config: What the class was made of, nested in any way.
    """
    said = in_a_sentence(said)
    for key, value in _settings(config, ""):
        last = key.rpartition(".")[2]
        if value is not None and re.search(rf"\b{last}\b", said) and str(value) in said:
            return f"--{key}={value}: {said}"
    return said


def _settings(config: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All settings, those of each class in a list as well, by the keys that users type."""
    if isinstance(config, Mapping):
        for name, inner in config.items():
            yield from _settings(inner, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(config, list) and any(isinstance(each, Mapping) for each in config):
        for each in config:
            yield from _settings(each, key)
    else:
        yield key, config


def listed(given: Any) -> list[Any]:
    """What a setting gives, as a list that may grow."""
    return list(given) if isinstance(given, list) else [given] if given else []


def untouched(value: Any) -> Any:
    """A config as plain values, of which jsonargparse takes nothing away."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {name: untouched(inner) for name, inner in value.items()}
    return [untouched(each) for each in value] if isinstance(value, list) else value


def _loose(config: Mapping[str, Any], key: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, class and content of each `dict_kwargs`, at which jsonargparse does not look."""
    for name, inner in config.items():
        below = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if name == "dict_kwargs":
            yield key, str(config.get("class_path")).rpartition(".")[2], inner
            continue
        for each in inner if isinstance(inner, list) else [inner]:
            if isinstance(each, dict):
                yield from _loose(each, below)


def _unfinished(kind: type[Any]) -> ConfigError:
    return ConfigError(f"{kind.__name__}: its __init__ must begin with super().__init__(...).")
