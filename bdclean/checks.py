"""Checks of single arguments; each gives the value back, or says what is allowed.

No number passes that is not finite: NaN is neither above nor below anything, so a plain comparison
would let it through.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from bdclean.errors import ConfigError

Number = TypeVar("Number", int, float)
MOST = 2**63 - 1
"""The largest number of those that count, and of seeds: torch takes no larger one."""
MOST_FLOAT = 1e30
"""The largest of all others: float32 ends at 3e38, and training multiplies."""


def check_positive(key: str, value: Number) -> Number:
    """Returns `value` if it is above 0.

    Raises:
        ConfigError: If it is not.
    """
    return _checked(key, value, value > 0, "above 0")


def check_not_negative(key: str, value: Number) -> Number:
    """Returns `value` if it is 0 or above.

    Raises:
        ConfigError: If it is not.
    """
    return _checked(key, value, value >= 0, "0 or above")


def check_least(key: str, value: Number, least: int) -> Number:
    """Returns `value` if it is at least `least`.

    Raises:
        ConfigError: If it is not.
    """
    return _checked(key, value, value >= least, f"at least {least}")


def check_share(key: str, value: float) -> float:
    """Returns `value` if it is above 0 and at most 1.

    Raises:
        ConfigError: If it is not.
    """
    return _checked(key, value, 0 < value <= 1, "above 0 and at most 1")


def check_between(key: str, value: Number, low: int, high: int) -> Number:
    """Returns `value` if it lies between `low` and `high`, which it may be as well.

    Raises:
        ConfigError: If it does not.
    """
    return _checked(key, value, low <= value <= high, f"between {low} and {high}")


def check_seed(key: str, value: int) -> int:
    """Returns `value` if it can be a seed.

    Raises:
        ConfigError: If it is below 0, or larger than torch takes.
    """
    return check_not_negative(key, value)


def check_fractions(key: str, values: Iterable[float]) -> None:
    """Checks milestones, which are fractions of a training.

    Raises:
        ConfigError: If one lies outside of 0 to 1.
    """
    if not all(0 <= value <= 1 for value in values):
        raise ConfigError(
            f"{key}={_listed(values)}: they are fractions of the epochs, from 0 to 1."
        )


def check_channels(mean: Iterable[float], std: Iterable[float]) -> None:
    """Checks the statistics of pixels in [0, 1].

    Raises:
        ConfigError: If a mean lies outside of 0 to 1, or a deviation is not above 0.
    """
    if not all(0 <= value <= 1 for value in mean):
        raise ConfigError(
            f"mean={_listed(mean)}: it must be between 0 and 1 in each channel, since pixels are."
        )
    if not all(0 < value < math.inf for value in std):
        raise ConfigError(f"std={_listed(std)}: it must be above 0 in each channel.")


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
    if not (min(shares.values()) >= 0 and abs(sum(shares.values()) - 1) <= 1e-6):
        given = ", ".join(f"{key}_{name}={value}" for name, value in shares.items())
        raise ConfigError(f"{given}: they must be 0 or above and add up to 1.")


def _checked(key: str, value: Number, fits: bool, allowed: str) -> Number:
    if isinstance(value, float) and not math.isfinite(value):
        allowed = f"a finite number, {allowed}"
    elif isinstance(value, float) and value > MOST_FLOAT:
        allowed = f"at most {MOST_FLOAT:g}"
    elif isinstance(value, int) and value > MOST:
        allowed = f"at most {MOST}"
    elif fits:
        return value
    raise ConfigError(f"{key}={value}: it must be {allowed}.")


def _listed(values: Iterable[float]) -> str:
    """As it is typed: without blanks, which would end the value in a message."""
    return f"[{', '.join(map(str, values))}]"
