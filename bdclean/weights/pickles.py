"""What the pickle of a torch file would do, found without doing it.

torch's restricted unpickler executes no code of a file. But a pickle of a few bytes can make it
allocate any memory, compare keys for hours, or overflow the stack of the interpreter. So its
instructions are followed here first: with names in place of functions, and sizes in place of
tensors. What torch itself refuses is left to torch, which says so.
"""

import io
import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from bdclean.weights.harmless import DICTIONARIES, NAMES

MOST_PICKLES = 5  # of a file without a zip archive: three that say what it is, content and keys
# The instructions of torch's unpickler, which stops at any other.
_KNOWN = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
        *("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"),
        *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    }
)
_CONSTANTS = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()}
_BYTES = {"Half": 2, "BFloat16": 2, "Short": 2, "Float": 4, "Int": 4, "Double": 8, "Long": 8}
_BYTES |= {"ComplexFloat": 8, "ComplexDouble": 16}  # of an element; all others have one
_LARGEST_ELEMENT = 16  # bytes
_LARGEST_KEY = 2**61 - 1  # larger numbers have hashes of smaller ones
_MOST_ODD_KEYS = 1000  # tuples and the like, whose hashes anybody can make equal
_MOST_DIMENSIONS = 64
_CHARACTERS = 10  # of a text, for one instruction
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")
# Modules whose functions torch's unpickler calls.
_CALLED = ("torch", "builtins", "collections", "_codecs")
_HARMLESS = frozenset(
    {
        "builtins.complex",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
    }
)  # they take no memory that their arguments do not have
_KEYED = ("collections.OrderedDict", "collections.Counter", "builtins.set")
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")


class RefusedError(Exception):
    """Why a pickle is not loaded: a clause that goes on after the name of its file."""


class AsksForError(RefusedError):
    """It asks for a call that no file of tensors needs; the text is the function's name."""


class DamagedError(RefusedError):
    """It is none that torch writes; the text says why."""


class TooMuchError(RefusedError):
    """It has more of something than the limit allows."""


@dataclass
class _Global:
    name: str


@dataclass
class _Dict:
    """A dictionary by its keys that are text."""

    is_ordered: bool = False
    keys: list[str] = field(default_factory=list)


class _List(list[Any]):
    """A list of the pickle."""


@dataclass
class _Storage:
    numel: int


class _Tensor:
    """A tensor whose size was checked."""


class _Other:
    """Anything else."""


_MADE: dict[str, type] = {"EMPTY_LIST": _List, "EMPTY_DICT": _Dict, "EMPTY_SET": _Other}
_TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """Follows pickles of one file.

    Args:
        most: Instructions that are followed.
        size: Bytes of the file; its storages may not claim more.

    Attributes:
        storages: Bytes that tensors claim, by the keys of the file's parts.
    """

    def __init__(self, most: int, size: int) -> None:
        self._left, self._most, self._size = most, most, size
        self.storages: dict[str, int] = {}
        self._claimed = 0
        self._repeated = 0
        self._odd_keys = 0

    def follow(self, pickle: io.BytesIO) -> Any:
        """Goes through the pickle that begins here, to its end.

        Returns:
            What it makes, as far as it is known; see `is_list_of_text`.

        Raises:
            RefusedError: If it should not be loaded.
            ValueError, KeyError, IndexError: If it is damaged, or has an instruction that torch
                does not know; torch refuses it as well.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        for code, argument, _ in pickletools.genops(pickle):
            self._charge(1)
            if code.name not in _KNOWN:
                raise ValueError(code.name)
            self._do(code.name, argument)
        return self._stack.pop()

    def _charge(self, work: int) -> None:
        """Counts instructions, and how much one of them goes through: a pickle may repeat it."""
        self._left -= work
        if self._left < 0:
            raise TooMuchError(f"has more than {self._most:,} instructions in its pickle")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in _TUPLES:
            self._pack(_TUPLES[name])
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name in _DOES:
            _DOES[name](self)
        elif name not in ("PROTO", "STOP"):
            stack.append(argument)  # a number or a text

    # ------------------------------------------------------------------ containers

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _pack(self, size: int | None) -> None:
        items = self._since_mark() if size is None else self._stack[-size:]
        if size is not None:
            del self._stack[-size:]
        self._stack.append(tuple(items))

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], _List):
            self._stack[-1].extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        for key in items[::2]:
            self._check_key(key)
            if isinstance(target, _Dict) and isinstance(key, str):
                target.keys.append(key)

    def _check_key(self, key: Any) -> None:
        if key is None or isinstance(key, str | bool | float):
            return
        if isinstance(key, int):
            fits = abs(key) < _LARGEST_KEY
        else:
            self._odd_keys += 1
            self._charge(_work(key))
            flat = not isinstance(key, tuple) or not any(isinstance(k, tuple) for k in key)
            fits = flat and self._odd_keys <= _MOST_ODD_KEYS
        if not fits:
            raise RefusedError(
                "has dictionaries whose keys are neither text nor usual numbers, as no state dict "
                "has them, and comparing them could take hours"
            )

    # ------------------------------------------------------------------ calls

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise RefusedError("calls what is no function")
        self._charge(sum(map(_work, arguments)))
        self._stack.append(self._call(function.name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        short = name.removeprefix("torch._utils.")
        first = arguments[0] if arguments else None
        if short in _TENSORS:
            return self._tensor(arguments)
        if short in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return first
        if name == "torch._tensor._rebuild_from_type_v2":
            function, _, inner, *_ = arguments
            if isinstance(function, _Global) and isinstance(inner, tuple):
                return self._call(function.name, inner)
        if name in DICTIONARIES:
            return _Dict(is_ordered=True)
        if name in _KEYED and (first is None or isinstance(first, _List | _Dict)):
            for item in first if isinstance(first, _List) else ():
                is_pair = name == "collections.OrderedDict" and isinstance(item, _List | tuple)
                self._check_key(item[0] if is_pair and item else item)
            return _Dict(is_ordered=True)
        if name == "builtins.bytearray" and not isinstance(first, int):
            return _Other()
        if name == "_codecs.encode" and _is_one_of(arguments[1:], _ENCODINGS):
            return _Other()
        if name in _HARMLESS or name in NAMES or name.split(".")[0] not in _CALLED:
            return _Other()  # torch refuses those that it does not know
        raise AsksForError(name)

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        self._charge(_work(state))
        if isinstance(target, _Tensor):
            raise RefusedError("changes a tensor after it was made")
        if not isinstance(target, _Dict):
            return
        hidden = state.keys if isinstance(state, _Dict) else ["?"]
        if others := [key for key in hidden if key != "_metadata"]:
            named = ", ".join(key[:50] for key in others[:5])
            raise RefusedError(f"has a dictionary with Python attributes of its own ({named})")

    # ------------------------------------------------------------------ sizes

    def _binpersid(self) -> None:
        named = self._stack.pop()
        if not isinstance(named, tuple) or len(named) < 5:
            _damaged("the name of a storage")
        kind, key, _, numel = named[1:5]
        fits = isinstance(kind, _Global) and isinstance(key, str) and isinstance(numel, int)
        if not fits or numel < 0:
            _damaged("the name of a storage")
        typed = kind.name.rpartition(".")[2].removesuffix("Storage")
        more = numel * _BYTES.get(typed, 1) - self.storages.get(key, 0)
        if more > 0:
            self.storages[key] = self.storages.get(key, 0) + more
            self._claimed += more
        if self._claimed > self._size:
            raise RefusedError(
                f"claims {self._claimed:,} bytes of tensors and has {self._size:,} in all"
            )
        self._stack.append(_Storage(numel))

    def _tensor(self, arguments: tuple[Any, ...]) -> _Tensor:
        storage, _, sizes, *others = arguments
        if not isinstance(storage, _Storage) or not _are_sizes(sizes):
            _damaged("a tensor")
        if math.prod(sizes) > storage.numel and not self._may_repeat(storage, sizes, others):
            raise RefusedError(
                f"has a tensor of {math.prod(sizes):,} numbers of which only {storage.numel:,} "
                "are in the file"
            )
        return _Tensor()

    def _may_repeat(self, storage: _Storage, sizes: tuple[int, ...], others: list[Any]) -> bool:
        """Whether a tensor shows the same numbers again, as `expand` does, and is small.

        All such tensors together are no larger than the file.
        """
        strides = others[0] if others else ()
        if not _are_sizes(strides) or len(strides) != len(sizes):
            return False
        reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        self._repeated += math.prod(sizes) * _LARGEST_ELEMENT
        return reach < storage.numel and self._repeated <= self._size


def _global(argument: str) -> _Global:
    """The function or class that torch finds, which goes by the names of Python 3."""
    module, _, name = argument.partition(" ")
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return _Global(f"{IMPORT_MAPPING.get(module, module)}.{name}")


def _work(value: Any) -> int:
    """How many instructions it is worth to go through a value once."""
    if isinstance(value, _Dict):
        return len(value.keys)
    if isinstance(value, str | bytes):
        return len(value) // _CHARACTERS
    return len(value) if isinstance(value, tuple | list) else 0


_DOES = {
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "SETITEM": Machine._setitem,
    "SETITEMS": Machine._setitems,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "BUILD": Machine._build,
    "BINPERSID": Machine._binpersid,
}


def is_list_of_text(value: Any) -> bool:
    """Whether a pickle that was followed makes a list of texts."""
    return isinstance(value, _List) and all(isinstance(item, str) for item in value)


def _are_sizes(sizes: Any) -> bool:
    if not isinstance(sizes, tuple) or len(sizes) > _MOST_DIMENSIONS:
        return False
    return all(isinstance(size, int) and size >= 0 for size in sizes)


def _is_one_of(values: Sequence[Any], allowed: Sequence[str]) -> bool:
    return len(values) == 1 and isinstance(values[0], str) and values[0] in allowed


def _damaged(what: str) -> NoReturn:
    raise DamagedError(f"{what} is none")
