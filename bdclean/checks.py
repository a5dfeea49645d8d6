"""Checks of single arguments; each gives the value back, or says what is allowed."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from bdclean.errors import ConfigError

Number = TypeVar("Number", int, float)


def check_positive(key: str, value: Number) -> Number:
    """Returns `value` if it is above 0.

    Raises:
        ConfigError: If it is not.
    """
    if value <= 0:
        raise ConfigError(f"{key}={value}: it must be above 0.")
    return value


def check_not_negative(key: str, value: Number) -> Number:
    """Returns `value` if it is 0 or above.

    Raises:
        ConfigError: If it is not.
    """
    if value < 0:
        raise ConfigError(f"{key}={value}: it must be 0 or above.")
    return value


def check_share(key: str, value: float) -> float:
    """Returns `value` if it is above 0 and at most 1.

    Raises:
        ConfigError: If it is not.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{key}={value}: it must be above 0 and at most 1.")
    return value


def check_choice(key: str, value: Any, allowed: Any) -> Any:
    """Returns `value` if it is one of the values of the Literal `allowed`.

    Raises:
        ConfigError: If it is not; YAML is checked before, but Python is not.
    """
    if value not in get_args(allowed):
        raise ConfigError(f"{key}={value!r}: it must be one of {', '.join(get_args(allowed))}.")
    return value


def check_add_up(key: str, shares: Mapping[str, float]) -> None:
    """Checks weights, called `<key>_<name>`, that are shares of a whole.

    Raises:
        ConfigError: If one is below 0 or they do not add up to 1.
    """
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        given = ", ".join(f"{key}_{name}={value}" for name, value in shares.items())
        raise ConfigError(f"{given}: they must be 0 or above and add up to 1.")
