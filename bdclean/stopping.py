"""SIGINT, SIGTERM and SIGHUP end a command with one line and the status that shells give.

Nothing heavy is imported here: a command listens before it imports anything else.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
AGAIN = "stopped; run the same command again."
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # in the order in which Lightning asks for them
_REQUEUE = "save_and_requeue"  # of `bdclean.callbacks.requeue`


class Stopped(KeyboardInterrupt):
    """The command was stopped by a signal. Lightning treats it as Ctrl-C.

    Args:
        signum: The signal.
        told: How to go on, for the user.
    """

    def __init__(self, signum: int = signal.SIGINT, told: str = AGAIN) -> None:
        super().__init__()
        self.signum, self.told = signum, told

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return 128 + self.signum


class _State:
    pid = 0  # of the process that listens
    received: Stopped | None = None
    importing = False


def listen() -> None:
    """Stops the command at the signals from here on, but for those that the user ignores."""
    _State.pid, _State.received, _State.importing = os.getpid(), None, False
    for each in SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:  # as under nohup
            signal.signal(each, _stop)


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


def tell_once(message: str) -> None:
    """As `tell`, on the first of several processes alone."""
    ranks = [os.environ[name] for name in _RANKS if name in os.environ]
    if not ranks or ranks[0] == "0":
        tell(message)


def _stop(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.pid:  # a worker of a loader, which inherits this
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    if _is_inside(frame, _REQUEUE):
        return
    again = _State.received is not None
    _State.received = Stopped(signum)
    if again or _State.importing:
        tell_once(AGAIN)
        os._exit(_State.received.status)
    raise _State.received


def _is_inside(frame: FrameType | None, function: str) -> bool:
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
