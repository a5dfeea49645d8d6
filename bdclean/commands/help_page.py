"""The help of every command in one style: usage, what it does, options, an example, where more is.

Options are read from parsers of jsonargparse; types are left out, which values and choices tell.
"""

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Mapping
from textwrap import fill, wrap
from typing import Any, Literal, get_args, get_origin

import yaml

from bdclean import shipped

WIDTH = 100
_COLUMN = 34  # where texts begin, at most
_PAGE = re.compile(r"docs/[\w/]+\.md")
_WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False}
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def page(usage: str, does: str, sections: Iterable[str], example: str = "", more: str = "") -> str:
    """The whole help of a command.

    Args:
        usage: One line, without the word `usage`.
        does: What the command does.
        sections: Tables of options, or text.
        example: A command that can be typed as it is.
        more: A page of the documentation, by its name in the repository.
    """
    parts = [f"usage: {usage}", does, *sections]
    parts += [_over_lines(f"Example: {example}")] if example else []
    parts += [f"More: {in_reach(more)}"] if more else []
    return "\n\n".join(part if "\n" in part else fill(part, WIDTH, **_WHOLE) for part in parts)


def in_reach(text: str) -> str:
    """A text, in which pages of the documentation are named by the paths that open them."""
    return _PAGE.sub(lambda found: shipped.page(found[0]), text)


def _over_lines(command: str) -> str:
    """A command over several lines, which a shell reads as one."""
    return " \\\n  ".join(wrap(command, WIDTH - 4, **_WHOLE))


def table(title: str, rows: Mapping[str, str]) -> str:
    """Options or commands, and what each is, below a title.

    Args:
        title: What they have in common; "" prints none.
        rows: The words that are typed, and the text.
    """
    column = min(_COLUMN, max(map(len, rows), default=0) + 4)
    blank, lines = " " * column, wrap(title, WIDTH, **_WHOLE)
    for left, text in rows.items():
        texts = wrap(text, WIDTH - column, **_WHOLE) or [""]
        begins = f"  {left}".ljust(column)
        if len(left) + 4 > column:
            lines.append(begins.rstrip())
            begins = blank
        lines += [f"{begins}{texts[0]}".rstrip(), *(f"{blank}{each}" for each in texts[1:])]
    return "\n".join(lines)


def rows_of(actions: Iterable[Action], values: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Rows of a table: each option with its value, and each word as the usage line has it.

    Args:
        actions: Of a parser; those that set nothing (`--help`, `--model.help`) are left out.
        values: What configs set, by dotted key; None leaves out defaults that are null as well.
    """
    rows = {}
    for action in actions:
        if SUPPRESS in (action.default, action.help):
            continue
        value = (values or {}).get(action.dest, action.default)
        plain = not action.option_strings or action.nargs == 0 or action.dest == "config"
        told = not plain and value != [] and (value is not None or values is not None)
        text = re.sub(r"\bNone\b", "null", " ".join((action.help or "").split()))
        if action.option_strings and action.required and value is None:
            text = f"{text} (required)"
        elif told:
            # Classes of others tell the default in their text as well.
            text = re.sub(r"\s*\(default:[^)]*\)", "", text)
            text = f"{text} (default: {shown(value)})".strip()
        rows[_left(action)] = text
    return rows


def choices_of(kind: Any) -> list[str]:
    """What may be given for a type that has few values; none for others."""
    if kind is bool:
        return ["true", "false"]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return [str(each) for each in parts]
    found = [choices_of(each) for each in parts if each is not type(None)]
    if get_origin(kind) in (list, tuple, dict) or not all(found):
        return []
    return [*(each for choices in found for each in choices), *["null"][: type(None) in parts]]


def shown(value: Any) -> str:
    """A value as a user types it, on one line; of a class the name and its arguments."""
    if isinstance(value, Mapping):
        name = value.get("class_path")
        others = {key: each for key, each in value.items() if key not in _CLASS_KEYS}
        given = (value.get("init_args") or {}) | others if name else value
        text = ", ".join(f"{key}: {shown(each)}" for key, each in given.items())
        return f"{{{text}}}" if not name else f"{_last(name)}{f' with {text}' if text else ''}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value)).split("\n")[0]


def _left(action: Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    names = [name for name in action.option_strings if not name.endswith("+")]
    metavar = "" if action.nargs == 0 else f" {_metavar(action)}"
    return ", ".join(f"{name}{metavar}" for name in names)


def _metavar(action: Action) -> str:
    choices = choices_of(getattr(action, "_typehint", None))
    if choices:
        return f"{{{','.join(choices)}}}"
    return action.metavar if isinstance(action.metavar, str) else "X"


def _last(name: Any) -> str:
    return str(name).rpartition(".")[2]
