"""The command line: finds a command in `bdclean.commands` and runs it.

Wrong use ends here, whatever raised it, with one message and exit status 2.
"""

import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches

import bdclean
from bdclean import stopping
from bdclean.commands import COMMANDS, overview
from bdclean.commands.quick_import import told_if_slow
from bdclean.commands.quiet import in_one_line
from bdclean.commands.words import expanded, with_pipes_read
from bdclean.errors import BdcleanError, ConfigError, behind
from bdclean.printable import printable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)
"""What is wrong with a path that a user gives, wherever it is looked at first."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Words after `bdclean`; None takes those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    plain, warnings.formatwarning = warnings.formatwarning, in_one_line
    try:
        with stopping.listening():
            status = _status(words)
    finally:
        warnings.formatwarning = plain
    if status:
        sys.exit(status)


def _status(words: list[str]) -> int:
    """Runs a command; what it raises is told. The exit status."""
    try:
        try:
            _run(words)
        finally:
            if sys.stdout is not None:  # as it is after `>&-`
                sys.stdout.flush()
    except KeyboardInterrupt as error:
        return _stopped(error)
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        _silence_stdout()
        return 128 + signal.SIGPIPE
    except Exception as error:
        if stopping.received() is not None:  # a library made another error of the signal
            return _stopped(error)
        told = behind(error, BdcleanError) or _bad_path(error) or _full_disk(error)
        if told is None:
            raise
        stopping.tell_of_all(printable(told))
        return 2
    return 0


def _stopped(error: BaseException) -> int:
    stop = error if isinstance(error, stopping.Stopped) else stopping.received()
    stop = stop or stopping.Stopped()
    stop.tell()
    return stop.status


def _bad_path(error: Exception) -> str | None:
    """What to say of a path that the system does not take; None of another error."""
    found = behind(error, OSError)
    if not isinstance(found, OSError) or found.errno not in _NAMES or found.filename is None:
        return None
    return f"{found.filename}: {found.strerror}."


def _full_disk(error: Exception) -> str | None:
    """What to say of a disk that takes no more; None of another error."""
    full = behind(error, OSError)
    if not isinstance(full, OSError) or full.errno not in _FULL:
        return None
    place = full.filename or "a file"
    try:
        print(end="", flush=True)  # what could not be written is still there
    except OSError:
        _silence_stdout()
        place = "the standard output"
    return f"{place} cannot be written: {full.strerror}."


def _silence_stdout() -> None:
    """Sends what is left nowhere, so that Python does not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> None:
    name, *rest = words or ["--help"]
    if name == "help":
        name, *rest = [*rest, "--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"bdclean {bdclean.__version__}")
    elif name in COMMANDS:
        rest = with_pipes_read(rest)
        if sys.argv[1:] == words:
            sys.argv[2:] = rest  # other processes of the run are started with these words
        expanded(rest)  # a config that is missing is told before seconds of imports
        with stopping.importing(), told_if_slow():
            command = COMMANDS[name].load()
        command(rest)
    else:
        raise ConfigError(
            f"{name or repr(name)} is no command.{_meant(name)} The commands are "
            f"{', '.join(COMMANDS)}; `bdclean --help` tells what each does."
        )


def _meant(name: str) -> str:
    """The sentence on what a word may mean that is no command; empty where nobody knows."""
    name = {"-v": "--version", "-?": "--help"}.get(name.lower(), name.lower())
    near = get_close_matches(name, [*COMMANDS, "--version", "--help"], n=1)
    if near and near[0].startswith("--") == name.startswith("--"):
        return f" Did you mean {near[0]}?"
    return " Give one before the options." if name.startswith("-") else ""
