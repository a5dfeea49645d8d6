"""Messages on weights files in the words of commands that say `--arch`, not `--model.arch`."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bdclean.commands.model_options import KEYS
from bdclean.errors import BdcleanError

_LONG = re.compile(rf"--(?:model|data)\.(?=(?:{'|'.join(KEYS)})\b)")


def shortened(text: str) -> str:
    """A message with the short options."""
    return _LONG.sub("--", text)


@contextmanager
def short_options() -> Iterator[None]:
    """Says errors and warnings with the short options; also a decorator of commands."""
    with warnings.catch_warnings():
        outer = warnings.showwarning

        def show(message: Warning | str, *more: Any, **others: Any) -> None:
            said = shortened(str(message))
            outer(type(message)(said) if isinstance(message, Warning) else said, *more, **others)

        warnings.showwarning = show
        try:
            yield
        except BdcleanError as error:
            said = shortened(str(error))
            if said == str(error):
                raise
            raise type(error)(said) from error
