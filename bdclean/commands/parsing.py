"""The parser of every command: one spelling of options, one message, one style of help."""

import re
from argparse import Action
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser, Namespace

from bdclean.commands.class_help import chosen_class
from bdclean.commands.help_page import page, rows_of, table
from bdclean.commands.hints import require_concrete
from bdclean.commands.messages import NO_VALUE, dotted, parse_error, room_of
from bdclean.commands.own_modules import failure
from bdclean.commands.rooms import BASES, arguments_of
from bdclean.commands.words import expanded, values_in
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
        self._words: list[str] = []

    def parse_args(self, args: Sequence[str], *more: Any, **kwargs: Any) -> Any:
        """As jsonargparse's.

        Raises:
            ConfigError: If a word, a value or a config file is wrong.
        """
        self._words = words = expanded(args)
        for word in words:
            name = word.partition("=")[0]
            if name in self._renamed:
                raise ConfigError(f"{name}: it is called {self._renamed[name]} now.")
        self._require_once(words)
        parse = super().parse_args  # type: ignore[misc]
        parsed = parse(words, *more, **kwargs)
        require_concrete(parsed)
        return parsed

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """As jsonargparse's, which lets null pass for anything, and a list for a group.

        Raises:
            TypeError: In jsonargparse's words, which `error` reads.
        """
        actions = {each.dest: each for each in vars(self)["_actions"]}
        typed = {key for key, each in actions.items() if hasattr(each, "_typehint")}
        for key in getattr(self, "groups", {}).keys() - typed:
            if key in namespace and not isinstance(value := namespace[key], dict | Namespace):
                raise TypeError(f'Parser key "{key}": Unable to load config "{value}"')
        for key in typed:
            hint, default = vars(actions[key])["_typehint"], actions[key].default
            if default is None or key not in namespace or namespace[key] is not None:
                continue
            if type(None) not in get_args(hint):
                raise TypeError(f'Parser key "{key}":\n  Expected a {hint}. Got value: null')
        super().validate(namespace, *args, **kwargs)  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises one sentence, in place of a page of usage.

        Raises:
            ConfigError: Always, but for parsers inside of jsonargparse, whose errors it reads.
        """
        if self.exit_on_error:
            message = NO_VALUE.sub(self._without_value, message)
            said = failure() or self._as_typed(parse_error(message, self._options()))
            raise ConfigError(said) from ex
        super().error(message, ex)  # type: ignore[misc]
        raise AssertionError

    def _require_once(self, words: Sequence[str]) -> None:
        """Refuses an option of ours with two values. Of settings of classes the last one counts."""
        actions = [each for parser in self._parsers() for each in vars(parser)["_actions"]]
        names = {name for each in actions if each.nargs != 0 for name in each.option_strings}
        several = {"-c", "--config", *(f"--{key}" for key in BASES)}
        given: dict[str, str] = {}
        for name, value in values_in(words):
            if name not in names or name in several or "." in name:
                continue
            if given.get(name, value) != value:
                raise ConfigError(
                    f"{name}: it is given twice, as {given[name]} and as {value}; give it once."
                )
            given[name] = value

    def _parsers(self) -> list[Any]:
        """This parser and those of its subcommands."""
        # If jsonargparse names this otherwise one day, hints at what was meant are fewer.
        subcommands = getattr(getattr(self, "_subcommands_action", None), "choices", {})
        return [self, *subcommands.values()]

    def _options(self) -> list[str]:
        """Dotted names of all options, also those of subcommands and of the chosen classes."""
        found = [key for parser in self._parsers() for key, _ in parser.get_defaults().items()]
        found.append("help")
        for key in BASES:
            kind = chosen_class(key, self._words)
            names = [] if kind is None else arguments_of(kind)
            found += [f"{key}.{name}".replace(".init_args", "") for name in names]
        return found

    def _without_value(self, said: re.Match[str]) -> str:
        """What argparse says, with the option as it was typed: `--model.width`, not `--model`."""
        for word, after in pairwise([*self._words, "-"]):
            known = [name for name in said[1].split("/") if f"{word}.".startswith(f"{name}.")]
            if known and after.startswith("-"):
                return said[0].replace(said[1], word)
        return said[0]

    def _as_typed(self, message: str) -> str:
        """The message, in which a word without dashes is called as in the usage line."""
        for parser in self._parsers():
            for action in vars(parser)["_actions"]:
                if not action.option_strings and isinstance(action.metavar, str):
                    message = re.sub(rf"(?<!\S)--{action.dest}\b", action.metavar, message)
        return message


class Parser(OneDialect, ArgumentParser):  # type: ignore[misc]
    """The parser of our own commands.

    Args:
        args: Of jsonargparse.
        example: A command that can be typed as it is, for the help.
        more: The page of the documentation that tells more.
        kwargs: Of jsonargparse.
    """

    def __init__(self, *args: Any, example: str = "", more: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._example, self._more = example, more

    def format_help(self, formatter: Any = None) -> str:
        """The help in the style of all commands."""
        actions: list[Action] = vars(self)["_actions"]
        subcommands = next((each for each in actions if isinstance(each.choices, Mapping)), None)
        tables = [table("", rows_of(each for each in actions if each is not subcommands))]
        if subcommands is not None:
            choices = vars(subcommands)["_choices_actions"]
            tables.append(table("Commands:", {each.dest: each.help or "" for each in choices}))
        tables += [self.epilog] if self.epilog else []
        usage, does = self.usage or self.prog, self.description or ""
        return f"{page(usage, does, filter(None, tables), self._example, self._more)}\n"
