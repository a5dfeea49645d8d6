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


class DivergedError(BdcleanError):
    """A training has left the finite numbers, or a model answers with such numbers."""


class AttackError(ConfigError):
    """An attack's setting does not fit the data set or the image size."""


def in_a_sentence(said: object) -> str:
    """What others say, on one line and with one mark at its end."""
    text = " ".join(str(said).split()).rstrip(". ")
    return text if text.endswith(("!", "?")) else f"{text}."


def in_words(error: BaseException) -> str:
    """What a library's error says, in one line, for the middle of a sentence of ours."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def counted(number: int, one: str, many: str = "") -> str:
    """A number with what it counts: `1 image`, `2,347 images`.

    Args:
        number: How many.
        one: What a single one is called, or said to be.
        many: As well of several; empty adds an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def behind(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first error of some kinds that caused `error`, which may be `error` itself.

    Libraries wrap what a class raises in errors of their own.
    """
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error
