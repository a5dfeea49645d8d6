"""One sentence for wrong words, with the key as users type it: `--model.recipe.lr`.

jsonargparse tells of a wrong word as a tree of everything that it tried, and lower rooms tell of
their own argument alone (`lr=-1`). Both are brought into one form here: key, value, what is
allowed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from types import TracebackType
from typing import Any

from bdclean.commands import hints
from bdclean.commands.rooms import KEYS, arguments_of, find_class

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_BASES = ("LightningModule", "LightningDataModule")
_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted"
    r"|Group '([^']+)' does not accept option '([^']+)'"
    r"|Subcommand '[^']+' does not accept option '([^']+)'"
    r"|unrecognized arguments: --([\w.+]+)"
)
_TYPES = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*)\])")
_GIVEN = (
    re.compile(r"Given value: (?!NestedArg|\{|Namespace)(.+?)(?:\. Got value: .*)?$", re.M),
    re.compile(r"Got value: (?!Namespace)(.+)"),
    re.compile(r"Given value: NestedArg\(key='[^']*', val='?(.*?)'?\)"),
)
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_RESTRICTED = re.compile(r"Not of type (\w+): (.+)")
_NO_CLASS = re.compile(
    r"Expected a dot import path string"
    r"|module '[\w.]+' has no attribute"
    r"|No module named"
    r"|does not correspond to a subclass"
    r"|Not a valid subclass"
    r"|Expected an instantiatable class"
)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true, false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number, 0 or above",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number, 0 or above",
}
_GIVE = {
    "model": "give a method with -c (`bdclean config ls`), or a class as --model CLASS",
    "data": "give a data set with -c (`bdclean config ls data`), or a class as --data CLASS",
}


def parse_error(message: str, options: Iterable[str]) -> str:
    """What jsonargparse says, in one sentence.

    Args:
        message: Its own, of one line or many.
        options: Dotted names that its parser knows, to find the one that was meant.
    """
    where = _descent(message)
    key = ".".join(_plain(found[1]) for found in where)
    if key == "config":
        return f"-c: {message.split(': ', 1)[1]}."
    inner = message[where[-1].end() :] if where else message
    known = list(options)
    for say in (_missing, _unknown, _group, _restricted, _wrong_type, _no_class, _plain_words):
        sentence = say(key, inner, message, known)
        if sentence:
            return sentence
    text = " ".join(message.split())
    return f"--{key}: {text}" if key else text


def dotted(message: str, config: Mapping[str, Any], room: str | None = None) -> str:
    """A message of a lower room with the key as users type it.

    Args:
        message: `NAME=VALUE: ...` or `NAME is VALUE; ...`, or any other text.
        config: Parsed, flat: dotted keys and their values.
        room: What the error came out of, as a prefix: `model`, `data` or `data.attack`; it decides
            where several keys have that name and value, or none.
    """
    message = re.sub(r"\b(data|model|trainer)\.init_args\.", r"--\1.", message)
    message = _plain(message)
    given = re.match(r"([a-z_][\w.]*)(=| is )([^\s:;,]+)", message)
    if given is None:
        return message
    name, sign, value = given.groups()
    keys = {
        _plain(key)
        for key, each in config.items()
        if f".{_plain(key)}".endswith(f".{name}") and str(each) == value.strip("'\"")
    }
    near = {key for key in keys if room and key.startswith(f"{room}.")} or keys
    if len(near) == 1:
        return f"--{near.pop()}={value}{message[given.end() :]}"
    return f"--{room}.{message}" if room and sign == "=" else message


def room_of(trace: TracebackType | None) -> str | None:
    """Where in a config the class stands that raised: `model`, `data` or `data.attack`.

    Args:
        trace: Of the error; the innermost room in it counts.
    """
    found = None
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        found = KEYS.get(".".join(module.split(".")[:2]), found)
        trace = trace.tb_next
    return found


def _missing(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = re.search(r"the following arguments are required: (.+)", message)
    if found is None:
        found = re.search(r'Key "(.+?)" is required', message)
    if found is None:
        return None
    name = found[1].split(", ")[0].rpartition(".")[2]
    if name in _GIVE:
        return f"--{name} is missing: {_GIVE[name]}."
    return f"--{name} is missing."


def _unknown(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = _UNKNOWN.search(inner)
    if found is None:
        return None
    name = _plain(".".join(part for part in found.groups() if part))
    name = f"{key}.{name}" if key else name
    line_end = (message + "\n").index("\n", message.index(found[0]))
    classes = _CLASS.findall(message[:line_end])
    if not (key and classes):
        return f"--{name}: there is no such option.{hints.meant(name, options)}"
    who = classes[-1].rpartition(".")[2]
    if who in _BASES:
        return f"--{name}: name the class first, with --{key} CLASS or a config of it."
    # The class may stand deeper than the key: `--model.optimizer.lrr` of an SGD.
    kind = find_class(classes[-1])
    known = [f"{key}.{_plain(each)}" for each in arguments_of(kind)] if kind else []
    return f"--{name}: {who} has no such option.{hints.meant(name, known)}"


def _group(key: str, inner: str, message: str, options: list[str]) -> str | None:
    if "Unable to load config" not in inner:
        return None
    return f"--{key}: set its options one by one, as --{key}.NAME VALUE."


def _restricted(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = _RESTRICTED.search(inner)
    if found is None or found[1] not in _WORDS:
        return None
    value = re.search(r"base 10: '(.*)'|float: '(.*)'|^(\S+) does not conform", found[2])
    shown = next((part for part in value.groups() if part), "?") if value else "?"
    return f"--{key}={shown}: it must be {_WORDS[found[1]]}."


def _wrong_type(key: str, inner: str, message: str, options: list[str]) -> str | None:
    subtypes = _SUBTYPES.findall(inner)
    if subtypes:
        allowed = _allowed(subtypes[-1])
    else:
        found = _TYPES.search(inner)
        allowed = _allowed(found[0]) if found else []
    if not set(allowed) - {"null", _WORDS["list"], _WORDS["dict"]}:
        return None
    if "is abstract" in inner:
        return None
    return f"--{key}{_equals(_value(inner))}: it must be {_either(allowed)}."


def _no_class(key: str, inner: str, message: str, options: list[str]) -> str | None:
    if not _NO_CLASS.search(inner):
        return None
    nested = re.search(r"NestedArg\(key='([^']+)'", inner)
    if "is abstract" in inner and nested and not key.endswith(_plain(nested[1])):
        return f"--{key}.{_plain(nested[1])}: name the class first, with --{key} CLASS."
    value = _value(inner)
    bases = re.findall(r"<class '([\w.]+)'>", "".join(_SUBTYPES.findall(inner)[-1:]))
    kinds = [kind for base in bases if isinstance(kind := find_class(base), type)]
    if any(map(is_dataclass, kinds)):
        return f"--{key}{_equals(value)}: it must be null, or set as --{key}.NAME VALUE."
    return f"--{key}{_equals(value)}: {hints.no_class(value, kinds)}"


def _plain_words(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = re.match(r"argument (?:-\w/)?(--?[\w.]+): expected .*argument", message)
    if found:
        return f"{found[1]}: a value must follow it."
    found = re.match(r"unrecognized arguments: (\S+)", message)
    if found:
        return f"{found[1]}: it is one word too many."
    found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if found:
        names = re.findall(r"[\w.-]+", found[2])
        return f"{found[1]}: it must be {_either(names)}."
    found = re.search(r"to be one of \{(.*)\}, but it was not provided", message)
    if found:
        return f"SUBCOMMAND is missing: give {_either(found[1].split(','))}."
    return None


def _plain(key: str) -> str:
    """A key without the levels that users need not type."""
    return key.replace(".init_args", "").replace(".class_path", "")


def _descent(message: str) -> list[re.Match[str]]:
    """The keys from the outermost to the innermost one, along the first of all branches."""
    found: list[re.Match[str]] = []
    depth = -1
    for match in _KEY.finditer(message):
        column = match.start() - (message.rfind("\n", 0, match.start()) + 1)
        if column <= depth:
            break
        if not found or found[-1][1] != match[1]:  # a group is tried in two ways
            found.append(match)
        depth = column
    return found


def _value(text: str) -> str | None:
    return next((found[1] for each in _GIVEN if (found := each.search(text))), None)


def _equals(value: str | None) -> str:
    return "" if value is None else f"={value}"


def _allowed(types: str) -> list[str]:
    words = []
    for literal, name in re.findall(r"Literal\[(.*?)\]|(?:<class '|\b)([a-zA-Z]+)", types):
        if literal:
            words += [each.strip().strip("'") for each in literal.split(",")]
        elif name in _WORDS:
            words += _WORDS[name].split(", ") if name == "bool" else [_WORDS[name]]
    return list(dict.fromkeys(words))


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
