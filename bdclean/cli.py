"""The command line: finds a command in `bdclean.commands` and runs it.

Wrong use ends here, whatever raised it, with one message and exit status 2.
"""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches

import bdclean
from bdclean.commands import COMMANDS, overview
from bdclean.commands.quiet import in_one_line
from bdclean.commands.words import expanded
from bdclean.errors import BdcleanError, ConfigError, behind
from bdclean.printable import printable

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Words after `bdclean`; None takes those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    plain, warnings.formatwarning = warnings.formatwarning, in_one_line
    try:
        _run(words)
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        wrong_use = behind(error, BdcleanError)
        if wrong_use is None:
            raise
        print(f"bdclean: {printable(wrong_use)}", file=sys.stderr)
        sys.exit(2)
    finally:
        warnings.formatwarning = plain


def _run(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"bdclean {bdclean.__version__}")
    elif name in COMMANDS:
        expanded(words)  # a config that is missing is told before seconds of imports
        COMMANDS[name].load()(words[1:])
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{name} is no command.{meant} The commands are {', '.join(COMMANDS)}; "
            "`bdclean --help` tells what each does."
        )
