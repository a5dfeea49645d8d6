"""Errors of wrong use. Their text says what happened, where, and what to change."""


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
