"""SIGINT, SIGTERM and SIGHUP end a command with one line and the status that shells give.

Nothing heavy is imported here: a command listens before it imports anything else.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
AGAIN = "stopped; run the same command again."
PATIENCE = 5.0
"""Seconds in which the first of several processes says what all have to say."""
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # in the order in which Lightning asks for them
_REQUEUE = "save_and_requeue"  # of `bdclean.callbacks.requeue`


class Stopped(KeyboardInterrupt):
    """The command was stopped by a signal. Lightning treats it as Ctrl-C.

    Args:
        signum: The signal.
        told: How to go on, for the user.

    Attributes:
        what: What has happened, for the beginning of a sentence.
    """

    what = "stopped"

    def __init__(self, signum: int = signal.SIGINT, told: str = AGAIN) -> None:
        super().__init__()
        self.signum, self.told = signum, told

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return 128 + self.signum

    def tell(self) -> None:
        """Says how to go on, on the first of several processes alone."""
        tell_once(self.told)


def _nothing() -> None:
    pass


class _State:
    pid = 0  # of the process that listens
    parent = 0
    received: Stopped | None = None
    importing = False
    tidy: Callable[[], None] = staticmethod(_nothing)


def listen() -> None:
    """Stops the command at the signals from here on, but for those that the user ignores."""
    _State.pid, _State.received, _State.importing = os.getpid(), None, False
    _State.parent = _State.parent or os.getppid()
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:  # as under nohup
            signal.signal(each, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what `postponed` held back


@contextmanager
def postponed() -> Iterator[None]:
    """Holds signals back within the block, and from a process begun there until it listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def listening() -> Iterator[None]:
    """Listens within the block; no other thread than the main one can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    listen()
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def importing() -> Iterator[None]:
    """Within the block a signal ends the process at once.

    Nothing has to be tidied then, and an exception that is raised in the midst of an import can
    go astray.
    """
    _State.importing = True
    try:
        yield
    finally:
        _State.importing = False


def received() -> Stopped | None:
    """The signal that came, even if a library made another error of it; None without one."""
    return _State.received


def tell(message: str) -> None:
    """Prints a line for the user."""
    with suppress(OSError, ValueError):  # nobody reads it: the disk is full, or it is closed
        print(f"bdclean: {message}", file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this is the first of several processes, or the only one."""
    ranks = [os.environ[name] for name in _RANKS if name in os.environ]
    return not ranks or ranks[0] == "0"


def is_orphan() -> bool:
    """Whether the process that started this one, as one of several, is gone."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and os.getppid() != _State.parent


def tell_once(message: str) -> None:
    """As `tell`, on the first of several processes alone."""
    if is_first():
        tell(message)


def tell_of_all(message: str) -> None:
    """As `tell`, once if all processes have the same to say.

    The first one ends the others then. Another one waits for that, and tells if it does not come.
    """
    if not is_first():
        time.sleep(PATIENCE)
    tell(message)


@contextmanager
def tidying(tidy: Callable[[], None]) -> Iterator[None]:
    """Within the block, `tidy` is called before the process ends at once."""
    before, _State.tidy = _State.tidy, tidy
    try:
        yield
    finally:
        _State.tidy = before


def end(stop: Stopped) -> NoReturn:
    """Ends the process at once."""
    try:
        _State.tidy()
        stop.tell()
    finally:
        os._exit(stop.status)


def _stop(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.pid:  # a worker of a loader, which inherits this
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    if is_requeued_in(frame):
        return
    again = _State.received is not None
    _State.received = Stopped(signum)
    if again or _State.importing:
        end(_State.received)
    raise _State.received


def is_requeued_in(frame: FrameType | None) -> bool:
    """Whether the checkpoint of a requeued job is being written; that ends first."""
    while frame is not None:
        if frame.f_code.co_name == _REQUEUE:
            return True
        frame = frame.f_back
    return False
