"""The options of a class that a user names: `bdclean fit --model.help CBD`."""

import inspect
from argparse import SUPPRESS, Action
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args

from jsonargparse import ArgumentParser

from bdclean.commands.help_page import page, rows_of, table
from bdclean.commands.hints import no_class
from bdclean.commands.own_modules import failure
from bdclean.commands.rooms import BASES, base_of, classes_of, name_of, named_class
from bdclean.commands.words import content_of, read_configs, values_in
from bdclean.errors import ConfigError

_HIDDEN = {"facts", "view", "params"}  # set by the data, by the method, and by the fit
_MORE = {
    "model": "docs/index.md",
    "data": "docs/how_to/data_sets.md",
    "data.attack": "docs/attacks/README.md",
}


def asked_for(words: Sequence[str]) -> tuple[str, str | None] | None:
    """The key and the class of `--KEY.help CLASS`; None where no word asks for that."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name.endswith(".help"):
            after = [each for each in words[place + 1 : place + 2] if not each.startswith("-")]
            given = value if equals else next(iter(after), None)
            return name[2:-5].replace(".init_args", ""), given
    return None


def class_page(command: str, words: Sequence[str]) -> str:
    """The help that `--KEY.help CLASS` asks for.

    Args:
        command: For the usage line: `fit`, `attack preview`.
        words: After the command, spelled and with the files of configs.

    Raises:
        ConfigError: If no class is named, or there is none of that name.
    """
    key, name = asked_for(words) or ("", None)
    chosen = {each: chosen_class(each, words) for each in BASES}
    base = base_of(key) if key in BASES else _type_of(key, chosen)
    kind = named_class(name, base) if name else chosen.get(key)
    if kind is None and base is not None and is_dataclass(base):
        kind = base
    if kind is None and name:
        no_such = f"--{key}.help={name}: {no_class(name, [base] if base else [])}"
        raise ConfigError(failure() or no_such)
    if kind is None and base is None and key.split(".")[0] in BASES:
        first = key.split(".")[0]
        raise ConfigError(f"--{key}.help: name the class first, with --{first} CLASS or -c CONFIG.")
    if kind is None:
        known = ", ".join(classes_of(base)) if base else ""
        raise ConfigError(
            f"--{key}.help: a class must follow it{f', one of {known}' if known else ''}."
        )
    taken = "" if is_dataclass(kind) else f" --{key} {name_of(kind, base)}"
    return page(
        f"bdclean {command}{taken} [--{key}.KEY VALUE ...]",
        _first(kind),
        options_of(kind, key, values_of(words), title="", whole=True),
        more=_MORE.get(key, ""),
    )


def options_of(
    kind: type,
    key: str,
    values: Mapping[str, Any],
    title: str | None = None,
    only: Collection[str] = (),
    *,
    whole: bool = False,
) -> list[str]:
    """Tables of the options of a class, one for each group of them.

    Args:
        kind: The class.
        key: Where it stands: `model`, `data.attack`.
        values: What configs set, by dotted key.
        title: Of the first table; None takes name and first sentence of the class.
        only: Names of arguments; none takes all.
        whole: Show the options of groups that may be null as well, as those of `--model.probe`.
    """
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(kind, key, skip=_HIDDEN, fail_untyped=False)
    title = f"{kind.__name__}: {_first(kind)}" if title is None else title
    own = len(key.split(".")) + 1
    tables, groups = [], []
    for group in vars(parser)["_action_groups"]:
        actions = [
            action
            for action in vars(group)["_group_actions"]
            if action.default is not SUPPRESS
            and (not only or action.dest.split(".")[own - 1] in only)
        ]
        groups += [action for action in actions if _group_in(action) is not None]
        rows = rows_of(actions, _brief(values, key))
        if not whole:
            rows |= {
                left: f"{text} `--{action.dest}.help` shows its options."
                for action in actions
                for left, text in rows.items()
                if _group_in(action) is not None and left.split(" ")[0] == f"--{action.dest}"
            }
        if rows:
            of_class = any(len(action.dest.split(".")) == own for action in actions)
            tables.append(table(title if of_class else f"{group.title}:", rows))
    for action in groups if whole else []:
        tables += _options_of_group(action, values)
    return tables


def _brief(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The values, in which an attack has its name alone, as its options have a table."""
    attack = values.get("data.attack") if key == "data" else None
    if not isinstance(attack, Mapping):
        return dict(values)
    return {**values, "data.attack": {"class_path": attack.get("class_path", "null")}}


def _options_of_group(action: Action, values: Mapping[str, Any]) -> list[str]:
    default = action.default if isinstance(action.default, Mapping) else {}
    given = flat(default, action.dest) | dict(values)
    kind, title = _group_in(action), f"Of --{action.dest}, where it is not null:"
    return [] if kind is None else options_of(kind, action.dest, given, title, whole=True)


def _group_in(action: Action) -> type | None:
    return _dataclass_in(getattr(action, "_typehint", None))


# ---------------------------------------------------------------------- what configs say


def chosen_class(key: str, words: Sequence[str]) -> type | None:
    """The class that files or words name for a key; None without one, or if there is no such."""
    name = chosen_name(key, words)
    return None if name is None else named_class(name, base_of(key))


def chosen_name(key: str, words: Sequence[str]) -> str | None:
    """What files or words name as the class for a key; None without one."""
    name = None
    for config in read_configs(words):
        name = _named(config, key) or name
    for option, value in values_in(words):
        if option in (f"--{key}", f"--{key}.class_path") and not value.startswith("-"):
            given = content_of(option, value)
            given = given.get("class_path") if isinstance(given, Mapping) else given
            name = given if isinstance(given, str) and given not in ("", "null") else None
    return name


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """What the config files of a command set, by dotted key as users type it; later ones win."""
    found: dict[str, Any] = {}
    for config in read_configs(words):
        found |= flat(config)
    return found


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys, without the levels `init_args`; a group has its own key."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        levels = [level for level in (above, str(name)) if level not in ("", "init_args")]
        key = ".".join(levels)
        if isinstance(value, Mapping):
            found |= {key: value} if name != "init_args" else {}
            found |= flat(value, key)
        elif name != "class_path":
            found[key] = value
    return found


def _named(config: Any, key: str) -> str | None:
    first, _, rest = key.partition(".")
    value = config.get(first) if isinstance(config, dict) else None
    if rest:
        return _named(value.get("init_args"), rest) if isinstance(value, dict) else None
    name = value.get("class_path") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


# ---------------------------------------------------------------------- classes


def _type_of(key: str, chosen: Mapping[str, type | None]) -> type | None:
    """The class or group that an argument of a chosen class takes: `model.probe`."""
    owner = max((each for each in chosen if key.startswith(f"{each}.")), key=len, default=None)
    kind = None if owner is None else chosen[owner]
    for name in key.removeprefix(f"{owner}.").split(".") if kind else []:
        taken = inspect.signature(kind, eval_str=True).parameters if kind else {}
        kind = _dataclass_in(taken[name].annotation) if name in taken else None
    return kind


def _dataclass_in(hint: Any) -> type | None:
    found = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
    return next((each for each in found if isinstance(each, type)), None)


def _first(kind: type) -> str:
    text = (inspect.getdoc(kind) or f"{kind.__name__}.").split("\n\n")[0]
    return " ".join(text.split())
