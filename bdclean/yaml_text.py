"""YAML as configs may hold it: plain values, each key once, nothing that holds itself.

jsonargparse reads configs as well, and takes the last of two equal keys without a word, or runs in
circles. So the text is looked at here first.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from bdclean.errors import ConfigError
from bdclean.printable import printable

MOST_BYTES = 128 * 1024
"""The largest config that is read. Those of our own have some three kilobytes."""
_MOST_LEVELS, _MOST_VALUES = 50, 100_000
_STANDARD = "tag:yaml.org,2002:"
_HALVES = re.compile(r"[\ud800-\udfff]")  # as "\ud800" is; no file or folder has such a name
_TAGS = {*yaml.SafeLoader.yaml_constructors, f"{_STANDARD}merge"}


def read(file: Path, source: str) -> str:
    """The text of a config file, or as much of one that is too large as shows that.

    Args:
        file: The file.
        source: What the message begins with, as in `-c mine.yaml`.

    Raises:
        ConfigError: If it cannot be read, or is no text in UTF-8.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(content) > MOST_BYTES:  # which may end within a character
            return content.decode("utf-8", "replace")
        raise ConfigError(f"{source}: it is no text in UTF-8, and so no config.") from error
    except OSError as error:
        raise ConfigError(f"{source}: it cannot be read ({error.strerror}).") from error


class NoYAMLError(ConfigError):
    """The text breaks the rules of YAML."""


@lru_cache
def parse(text: str, source: str) -> Any:
    """The content of YAML text, which is read once and not to be changed.

    Args:
        text: Of one document.
        source: What the message begins with, as in `-c mine.yaml`.

    Raises:
        ConfigError: If it is no YAML, or not plain. One sentence with the line.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source}: it is larger than {MOST_BYTES // 1024} kB, as no config is.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, (), {})
        return loader.construct_document(node)
    except _NotPlainError as error:
        raise ConfigError(f"{source}: {error}.") from error
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = printable(error.problem)
        raise NoYAMLError(f"{source}: it is no YAML ({place}{problem}).") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}: line {line} holds the character {error.character:#06x}, which is none of "
            "YAML."
        ) from error
    except (ValueError, AttributeError) as error:  # of 5,000 digits; the 13th month; no date
        raise ConfigError(f"{source}: it holds a number or date that nobody can read.") from error


class _NotPlainError(Exception):
    """Says what is not plain."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Stops where brackets are nested too deeply, before Python does."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's."""
        self.levels += 1
        if self.levels > _MOST_LEVELS:
            raise _NotPlainError(f"it is nested more than {_MOST_LEVELS} levels deep")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def _count(node: Any, above: tuple[Any, ...], known: dict[Any, int]) -> int:
    """How many values stand below a node, written out; refuses what is not plain."""
    line = node.start_mark.line + 1
    if node in above:
        raise _NotPlainError(f"the value that begins in line {line} holds itself")
    if node in known:
        return known[node]
    if node.tag not in _TAGS:
        tag = printable(node.tag.replace(_STANDARD, "!!"))
        raise _NotPlainError(
            f"line {line} asks for {tag}; a config holds text, numbers, lists and mappings alone"
        )
    if isinstance(node, yaml.ScalarNode) and _HALVES.search(node.value):
        raise _NotPlainError(f"line {line} holds half a character")
    below = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys([key for key, _ in below])
        below = [each for pair in below for each in pair]
    known[node] = 1 + sum(_count(each, (*above, node), known) for each in below)
    if known[node] > _MOST_VALUES:
        raise _NotPlainError(f"it holds more than {_MOST_VALUES:,} values")
    return known[node]


def _check_keys(keys: list[Any]) -> None:
    seen: set[tuple[str, str]] = set()
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise _NotPlainError(f"line {line}: a list or a mapping is no key")
        if not key.value.strip("."):
            raise _NotPlainError(f"line {line} has a key without a name")
        if (key.tag, key.value) in seen:
            raise _NotPlainError(f"line {line} has the key {printable(key.value)} a second time")
        seen.add((key.tag, key.value))
