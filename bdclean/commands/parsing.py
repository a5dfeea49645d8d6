"""The parser of every command: one spelling of options, one message for a wrong word."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from bdclean.commands.messages import dotted, parse_error, room_of
from bdclean.commands.words import expanded
from bdclean.errors import BdcleanError, ConfigError, behind


@contextmanager
def in_users_words(config: Callable[[], Namespace | None]) -> Iterator[None]:
    """Gives what a class says of its argument the key that users type.

    Args:
        config: Gives the parsed words, None before they are parsed; called if there is an error.
    """
    try:
        yield
    except Exception as error:
        said, parsed = behind(error, BdcleanError), config()
        if said is None or parsed is None:
            raise
        text = dotted(str(said), dict(parsed.items()), room_of(said.__traceback__))
        raise type(said)(text) from error


class OneDialect:
    """Takes dashes for underscores, and raises what jsonargparse would print.

    Args:
        args: Of jsonargparse.
        renamed: Options that have another name now, and that name.
        kwargs: Of jsonargparse.
    """

    exit_on_error: bool

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        # A run must not depend on a word that is cut short, which another option may begin with.
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))
        self._renamed = renamed or {}

    def parse_args(self, args: Sequence[str], *more: Any, **kwargs: Any) -> Any:
        """As jsonargparse's.

        Raises:
            ConfigError: If a word, a value or a config file is wrong.
        """
        words = expanded(args)
        for word in words:
            name = word.partition("=")[0]
            if name in self._renamed:
                raise ConfigError(f"{name}: it is called {self._renamed[name]} now.")
        parse = super().parse_args  # type: ignore[misc]
        return parse(words, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises one sentence, in place of a page of usage.

        Raises:
            ConfigError: Always, but for parsers inside of jsonargparse, whose errors it reads.
        """
        if self.exit_on_error:
            raise ConfigError(parse_error(message, self._options())) from ex
        super().error(message, ex)  # type: ignore[misc]
        raise AssertionError

    def _options(self) -> list[str]:
        """Dotted names of all options, those of subcommands among them."""
        # If jsonargparse names this otherwise one day, hints at what was meant are fewer.
        subcommands = getattr(getattr(self, "_subcommands_action", None), "choices", {})
        parsers: list[Any] = [self, *subcommands.values()]
        return [key for parser in parsers for key, _ in parser.get_defaults().items()]


class Parser(OneDialect, ArgumentParser):  # type: ignore[misc]
    """The parser of our own commands."""
