"""Options of commands that read a model from anywhere: what its file may not say of itself."""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from bdclean.backbones.split import Stem
from bdclean.checking import TESTS
from bdclean.errors import ConfigError

Colour = tuple[float, float, float]
KEYS = ("arch", "width", "stem", "input_size", "mean", "std")


def add_model_options(parser: ArgumentParser) -> None:
    """Adds an option for each of `KEYS`."""
    add: Any = parser.add_argument  # jsonargparse takes types that argparse does not know
    add("--arch", type=str | None, metavar="NAME", help="Architecture of a foreign file.")
    add("--width", type=PositiveInt | None, metavar="N", help="Channels of its first layer.")
    add("--stem", type=Stem | None, help="Its first layers, of a network of ours.")
    add("--input_size", type=PositiveInt | None, metavar="N", help="Side of its images.")
    add(
        "--mean",
        type=Colour | None,
        metavar="[R,G,B]",
        help="Mean of its normalisation, of pixels in [0, 1]; as published if left out.",
    )
    add("--std", type=Colour | None, metavar="[R,G,B]", help="Its standard deviation.")


def add_test_options(parser: ArgumentParser) -> None:
    """Adds `--images` and `--tests`."""
    add: Any = parser.add_argument
    add(
        "--images",
        type=PositiveInt | None,
        metavar="N",
        help="How many the tests use, at most; 500 up to 64 pixels, else 128, if left out.",
    )
    add(
        "--tests",
        type=str | None,
        metavar="NAME,...",
        help=f"Some of {', '.join(TESTS)}; all if left out.",
    )


def chosen_tests(key: str, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Which tests run, in their order.

    Args:
        key: The option, for messages.
        names: Some of `TESTS`, with commas between or in a list; None for all.

    Raises:
        ConfigError: If it is none of them.
    """
    if names is None:
        return TESTS
    given = [
        name.strip().lower() for name in (names.split(",") if isinstance(names, str) else names)
    ]
    wrong = [name for name in given if name not in TESTS]
    if wrong or not given:
        raise ConfigError(
            f"{key}={','.join(given)!r}: it must be some of {', '.join(TESTS)}, with commas "
            "between."
        )
    return tuple(name for name in TESTS if name in given)


def known_of(chosen: Namespace) -> dict[str, Any]:
    """The options as arguments of `load_model`."""
    return {key: getattr(chosen, key) for key in KEYS}


def words_of(chosen: Namespace) -> list[str]:
    """The options that were given, as words of another command."""
    given = {key: value for key, value in known_of(chosen).items() if value is not None}
    return [f"--{k}={list(v) if isinstance(v, tuple) else v}" for k, v in given.items()]
