"""Errors of wrong use. Their text says what happened, where, and what to change."""

from typing import TypeVar

Number = TypeVar("Number", int, float)


class BdcleanError(Exception):
    """Wrong use. The command line prints the text alone and exits with status 2."""


class ConfigError(BdcleanError):
    """A setting is out of its range or does not fit another one."""


class DataError(BdcleanError):
    """A data set or an image file is missing or not of the expected form."""


class WeightsError(BdcleanError):
    """A weights file cannot be read safely, or does not fit the model."""


class FileError(BdcleanError):
    """A file cannot be written."""


class AttackError(ConfigError):
    """An attack's setting does not fit the data set or the image size."""


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
