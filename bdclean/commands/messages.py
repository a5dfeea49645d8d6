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
from bdclean.commands.type_words import WORDS, allowed_for, either
from bdclean.printable import printable

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_BASES = ("LightningModule", "LightningDataModule")
_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted"
    r"|Group '([^']+)' does not accept option '([^']+)'"
    r"|Subcommand '[^']+' does not accept option '([^']+)'"
    r"|unrecognized arguments: --([\w.+]+)"
)
_REQUIRED = re.compile(r'Key "(.+?)" is required|the following arguments are required: (.+)')
NO_VALUE = re.compile(r"argument (-\S+): expected .*argument")
"""What argparse says of an option without its value, by all its names: `-c/--config`."""
_EXPECTED = re.compile(r"Expected an? |Does not validate against")
_FILES = ("weights", "root", "surrogate", "trigger")
_SET_BY_OTHERS = {"facts", "view"}  # by the data, and by the method: nobody types these
_KEYS = re.compile(r"(?<![\w./-])(?:model|data|trainer)(?:\.[a-z_]\w*)+")
_GIVEN_VALUE = re.compile(r"([a-z_][\w.]*)(=| is )(\[[^\]]*\]|[^\s:;,]+)")
_TYPES = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*)\])")
_GIVEN = (
    re.compile(r"Given value: (?!NestedArg|\[?\{|\[?Namespace)(.+?)(?:\. Got value: .*)?$", re.M),
    re.compile(r"Got value: (?!Namespace)(.+)"),
    re.compile(r"import path (?:string|format): (.*)"),
    re.compile(r"Given value: NestedArg\(key='[^']*', val='?(.*?)'?\)"),
    re.compile(r"Given value: \[?\{'class_path': '([^']*)'"),
)
_YAML = {"None": "null", "True": "true", "False": "false"}
_LONGEST = 200  # characters of what jsonargparse says and nothing here reads
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_RESTRICTED = re.compile(r"Not of type (\w+): (.+)")
_NO_CLASS = re.compile(
    r"Expected a dot import path string"
    r"|module '[\w.]+' has no attribute"
    r"|No module named"
    r"|does not correspond to a subclass"
    r"|Not a valid subclass"
    r"|Expected an instantiatable class"
    r"|Expected an import path or a subclass spec"
    r"|Expected a typing\.Callable"
    r"|Unexpected import path format"
)
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
    for say in _SENTENCES:
        sentence = say(key, inner, message, known)
        if sentence:
            return sentence
    text = " ".join(message.split())
    if len(text) > _LONGEST:
        text = "this value does not fit here."
        return f"--{key}{_equals(_value(inner))}: {text}" if key else f"A config: {text}"
    return f"--{key}: {text}" if key else text


def dotted(message: str, config: Mapping[str, Any], room: str | None = None) -> str:
    """A message of a lower room with the key as users type it.

    Args:
        message: `NAME=VALUE: ...` or `NAME is VALUE; ...`; or about a file, whose path it begins
            with; or any other text.
        config: Parsed, flat: dotted keys and their values.
        room: What the error came out of, as a prefix: `model`, `data` or `data.attack`; it decides
            where several keys have that name and value, or none.
    """
    message = re.sub(r"\b(data|model|trainer)\.init_args\.", r"--\1.", message)
    message = _KEYS.sub(lambda found: _dashed(found[0], map(_plain, config)), _plain(message))
    files = [_plain(key) for key, each in config.items() if _begins(message, key, each)]
    if near := _nearest(files, room):
        return f"--{near} {message}"
    given = _GIVEN_VALUE.match(message)
    if given is None:
        return message
    name, sign, value = given.groups()
    keys = [
        _plain(key)
        for key, each in config.items()
        if f".{_plain(key)}".endswith(f".{name}")
        and _shown(each) == value.strip("'\"")
        and _SET_BY_OTHERS.isdisjoint(key.split("."))
    ]
    if near := _nearest(keys, room):
        return f"--{near}={value}{message[given.end() :]}"
    # Of a name that stands deeper nobody knows which one is meant, if the value tells it not.
    deeper = any(_plain(key).endswith(f".{name}") for key in config)
    return f"--{room}.{message}" if room and sign == "=" and not deeper else message


def _dashed(name: str, known: Iterable[str]) -> str:
    """A dotted name as an option, if it is one or a group of some."""
    return f"--{name}" if any(f"{key}.".startswith(f"{name}.") for key in known) else name


def _nearest(keys: Iterable[str], room: str | None) -> str | None:
    """The one key there is, or the one of a room; None if that is not clear."""
    found = set(keys)
    near = {key for key in found if room and key.startswith(f"{room}.")} or found
    return near.pop() if len(near) == 1 else None


def _begins(message: str, key: str, value: Any) -> bool:
    """Whether a message begins with a path of the config."""
    path = printable(value) if isinstance(value, str) and key.endswith(_FILES) else ""
    return bool(path) and message.startswith((f"{path}:", f"{path} "))


def _shown(value: Any) -> str:
    """A value as messages show it, tuples as lists."""
    return str(list(value) if isinstance(value, tuple) else value)


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
    found = _REQUIRED.search(inner)
    if found is None:
        return None
    name = str(found[1] or found[2]).split(", ")[0]
    if key:
        return f"--{key}.{name} is missing."
    name = name.rpartition(".")[2]
    if name in _GIVE:
        return f"--{name} is missing: {_GIVE[name]}."
    return f"--{name} is missing."


def _unknown(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = _UNKNOWN.search(inner)
    if found is None or found[0] not in _branch(message):
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
    if name == f"{key}.class_path":
        return f"--{key}: beside its class_path there may be init_args and no more."
    kind = find_class(classes[-1])
    known = [f"{key}.{_plain(each)}" for each in arguments_of(kind)] if kind else []
    known += [f"{key}.class_path", f"{key}.init_args"]
    return f"--{name}: {who} has no such option.{hints.meant(name, known)}"


def _group(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = re.search(r'Unable to load config "(.*)"', inner, re.S)
    if found is None:
        return None
    value = _YAML.get(found[1], found[1])
    return f"--{key}{_equals(value)}: set its options one by one, as --{key}.NAME VALUE."


def _restricted(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = _RESTRICTED.search(inner)
    if found is None or found[1] not in WORDS:
        return None
    value = re.search(r"base 10: '(.*)'|float: '(.*)'|^(\S+) does not conform", found[2])
    shown = next((part for part in value.groups() if part), "?") if value else _value(inner)
    return f"--{key}={shown}: it must be {WORDS[found[1]]}."


def _wrong_type(key: str, inner: str, message: str, options: list[str]) -> str | None:
    if not _EXPECTED.search(inner) or "is abstract" in inner:
        return None
    allowed, value = _by_annotation(message) or _by_name(inner), _value(inner)
    may_be_class = bool(_NO_CLASS.search(inner))
    if not allowed or (may_be_class and (_is_dotted(value) or hints.near_class(value, key))):
        return None
    if may_be_class and WORDS["float"] not in allowed:  # a tensor is no class to name
        allowed = ["a class", *allowed]
    if WORDS["float"] in allowed and str(value).lower().strip("+-.") in ("inf", "nan"):
        allowed[allowed.index(WORDS["float"])] = "a finite number"
    return f"--{key}{_equals(value)}: it must be {either(allowed)}."


def _is_dotted(value: str | None) -> bool:
    """Whether a value looks like the import path of a class."""
    return value is not None and bool(re.fullmatch(r"[A-Za-z_]\w*(\.\w*)+", value))


def _by_annotation(message: str) -> list[str]:
    """What the argument may be that the innermost key names, of the class that was named last."""
    where = _descent(message)
    if not where:
        return []
    owners = _CLASS.findall(message[: where[-1].start()])
    return allowed_for(where[-1][1], owners[-1] if owners else None)


def _by_name(inner: str) -> list[str]:
    """What the types that jsonargparse names say, where there is no annotation to look at."""
    subtypes = _SUBTYPES.findall(inner)
    found = _TYPES.search(inner)
    allowed = _allowed(subtypes[-1] if subtypes else found[0] if found else "")
    return allowed if set(allowed) - {WORDS[each] for each in ("NoneType", "list", "dict")} else []


def _no_class(key: str, inner: str, message: str, options: list[str]) -> str | None:
    if not _NO_CLASS.search(inner):
        return None
    nested = re.search(r"NestedArg\(key='([^']+)'", inner)
    if "is abstract" in inner and nested and not key.endswith(_plain(nested[1])):
        return f"--{key}.{_plain(nested[1])}: name the class first, with --{key} CLASS."
    value = _value(inner)
    if re.search(r"(?:Given|Got) value: \{'init_args'", inner):
        return f"--{key}: name the class first, with --{key} CLASS or a config of it."
    bases = re.findall(r"<class '([\w.]+)'>", "".join(_SUBTYPES.findall(inner)[-1:]))
    kinds = [kind for base in bases if isinstance(kind := find_class(base), type)]
    if any(map(is_dataclass, kinds)):
        return f"--{key}{_equals(value)}: it must be null, or set as --{key}.NAME VALUE."
    return f"--{key}{_equals(value)}: {hints.no_class(value, kinds, key)}"


def _odd_mapping(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = re.search(r"Key must be a string, got: (.*)\.", message)
    if found:
        return (
            f"--{key}={found[1]}: it must be the name of an option."
            if key
            else (f"{found[1]}: a key of a config is the name of an option, as `run`.")
        )
    if re.search(r"'\w+' object has no attribute '(keys|items)'", inner):
        return f"--{key}: its init_args must hold keys and values."
    if "unhashable type" in inner or re.search(r"'class_path': [^']", inner):
        return f"--{key}: its class_path must be the name of a class."
    if "Exceeds the limit" in inner and "digits" in inner:
        return f"--{key}: it has too many digits."
    return None


def _plain_words(key: str, inner: str, message: str, options: list[str]) -> str | None:
    found = NO_VALUE.match(message)
    if found:
        return f"{found[1].split('/')[0]}: a value must follow it."
    found = re.match(r"unrecognized arguments: (\S+)", message)
    if found:
        return f"{found[1]}: it is one word too many.{hints.meant_as(found[1], options)}"
    found = re.match(r'Invalid option "(.*)" for --print_config', message)
    if found:
        return f"--print_config={found[1]}: it must be comments, skip_default or skip_null."
    found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if found:
        names = re.findall(r"[\w.-]+", found[2])
        meant = hints.OTHER_COMMANDS.get(found[1])
        hint = f" Did you mean {meant}?" if meant in names else ""
        return f"{found[1]}: it must be {either(names)}.{hint}"
    found = re.search(r"to be one of \{(.*)\}, but it was not provided", message)
    if found:
        return f"SUBCOMMAND is missing: give {either(found[1].split(','))}."
    return None


_SENTENCES = (
    _missing,
    _unknown,
    _group,
    _restricted,
    _wrong_type,
    _no_class,
    _odd_mapping,
    _plain_words,
)


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


def _branch(message: str) -> str:
    """What is said of the innermost key, without the other kinds of value that were tried."""
    where = _descent(message)
    if not where:
        return message
    column = where[-1].start() - (message.rfind("\n", 0, where[-1].start()) + 1)
    end = re.compile(rf"^ {{0,{max(0, column - 1)}}}\S", re.M).search(message, where[-1].end())
    return message[where[-1].end() : end.start() if end and column else None]


def _value(text: str) -> str | None:
    found = next((found[1] for each in _GIVEN if (found := each.search(text))), None)
    return found if found is None else _YAML.get(found, found)


def _equals(value: str | None) -> str:
    return "" if value is None else f"={value or repr(value)}"


def _allowed(types: str) -> list[str]:
    words = []
    for literal, name in re.findall(r"Literal\[(.*?)\]|(?:<class '|\b)([a-zA-Z]+)", types):
        if literal:
            words += [each.strip().strip("'") for each in literal.split(",")]
        elif name in WORDS:
            words += WORDS[name].split(", ") if name == "bool" else [WORDS[name]]
    return list(dict.fromkeys(words))
