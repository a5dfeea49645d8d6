"""Objects that checkpoints hold beside their tensors, read as nothing.

torch's restricted unpickler refuses a whole file for one number of NumPy's in it. The names below
are let through, but not the classes: in place of each comes a stub that takes any arguments, does
nothing and holds nothing. So no code of such a class runs, and its package is not even imported.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Nothing:
    """What stands in place of an object."""

    def __init__(self, *arguments: object) -> None:
        """Takes any arguments and forgets them."""

    def __new__(cls, *_: object) -> "Nothing":
        """The unpickler calls this with any arguments too."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Takes any state and forgets it."""


def _dictionary(*_: object) -> dict[Any, Any]:
    """In place of a dict of another kind; the unpickler fills it."""
    return OrderedDict()


def _list(*_: object) -> list[Any]:
    """In place of a list of another kind; the unpickler fills it."""
    return []


DICTIONARIES = ("collections.defaultdict",)
_NUMPY_TYPES = (
    *("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64"),
    *("Float16", "Float32", "Float64", "Complex64", "Complex128", "Str", "Bytes", "Object"),
)
_OBJECTS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *("builtins.list", "builtins.dict", "builtins.int", "builtins.float"),
    *("builtins.range", "builtins.slice", "builtins.frozenset"),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"pathlib.Pure{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(f"numpy.dtypes.{name}DType" for name in _NUMPY_TYPES),
    "torch.torch_version.TorchVersion",
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "typing.Any"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
)

HARMLESS: tuple[tuple[Callable[..., Any], str], ...] = (
    *((_dictionary, name) for name in DICTIONARIES),
    (_list, "collections.deque"),
    *((Nothing, name) for name in _OBJECTS),
)
"""What `torch.serialization.safe_globals` takes: a stub, and the name for which it stands."""

NAMES = frozenset(name for _, name in HARMLESS)
