"""Training, poisoning and label-free purification of image models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdclean.api import PurifyResult as PurifyResult
    from bdclean.api import Verdict as Verdict
    from bdclean.api import check as check
    from bdclean.api import purify as purify

__version__: str

_OFFERED = ("PurifyResult", "Verdict", "check", "purify")


def __getattr__(name: str) -> Any:
    """The version and the functions, read when they are asked for.

    `python -m bdclean` begins in the user's folder, and torch takes seconds.
    """
    if name == "__version__":
        from importlib.metadata import version

        return version("bdclean")
    if name in _OFFERED:
        from bdclean import api

        return getattr(api, name)
    raise AttributeError(f"module 'bdclean' has no attribute {name!r}")


def __dir__() -> list[str]:
    """With what is not imported yet."""
    return sorted({*globals(), "__version__", *_OFFERED})
