"""The processes of one command end together, whichever of them is stopped or dies."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bdclean import stopping
from bdclean.errors import BdcleanError, behind
from bdclean.stopping import Stopped

GRACE = 6.0
"""Seconds in which a process ends by itself."""
NOTICE = 3.0
"""Seconds after which a process that is gone is known to be."""
_BEAT = 0.2


class Lost(Stopped):
    """Another process of the command has ended.

    Args:
        name: Of the process.
        code: How it ended, as `Popen.returncode` says it.
    """

    def __init__(self, name: str, code: int) -> None:
        super().__init__(-code if code < 0 else max(code - 128, 0))
        self._code = code
        if not self.signum:
            self.what = f"{name} has ended with status {code}, and said why"
        elif self.signum == signal.SIGKILL:
            self.what = f"{name} was killed, as the system does when memory runs out"
        else:
            self.what = f"{name} was stopped by signal {self.signum}"

    @property
    def status(self) -> int:
        """As the shell gives it of the other process."""
        return 128 + self.signum if self.signum else self._code


class Orphaned(Lost):
    """The first process of the command has ended, so that one of the others has to say so."""

    def __init__(self) -> None:
        super().__init__("the first process of the command", -signal.SIGKILL)

    def tell(self) -> None:
        """Says it once."""
        if os.environ.get("LOCAL_RANK") == "1":
            stopping.tell(self.told)


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes as Lightning does, and ends them when this one fails.

    Lightning's own watches them as well, and kills this process if one of them fails: it could
    neither say why nor give back its lock.
    """

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        """Starts the processes and calls the function.

        Raises:
            Lost: If the function failed because another process is gone.
        """
        if not self.cluster_environment.creates_processes_externally:
            with stopping.postponed():
                self._call_children_scripts()  # from here on they count as started elsewhere
        try:
            try:
                return super().launch(function, *args, trainer=trainer, **kwargs)
            except RuntimeError as error:  # as those of torch.distributed are
                alone = stopping.received() is None and behind(error, BdcleanError) is None
                lost = self.lost(NOTICE) if alone else None
                if lost is None:
                    raise
                raise lost from error
        except BaseException:
            self.kill(signal.SIGKILL)
            raise

    def lost(self, seconds: float = 0.0) -> Lost | None:
        """The process that has failed, or does so within some seconds; None without one."""
        until = time.monotonic() + seconds
        while True:
            for number, process in enumerate(self.procs, 2):
                if process.poll():
                    name = f"process {number} of {len(self.procs) + 1}"
                    return Lost(name, process.returncode)
            if stopping.is_orphan():
                return Orphaned()
            if time.monotonic() >= until:
                return None
            time.sleep(_BEAT)


def take_over(trainer: Trainer) -> None:
    """Replaces what Lightning does with signals and with processes that fail.

    Its handler of SIGTERM waits for the other processes, which may wait for this one.
    """
    connector, strategy = vars(trainer)["_signal_connector"], trainer.strategy
    connector._sigterm_notifier_fn = partial(_note, connector)
    if type(strategy.launcher) is _SubprocessScriptLauncher:
        old = strategy.launcher
        strategy._launcher = Launcher(old.cluster_environment, old.num_processes, old.num_nodes)


def _note(connector: Any, *_: Any) -> None:
    connector.received_sigterm = True


@contextmanager
def ending_together(
    trainer: Trainer, tidy: Callable[[], None], told: Callable[[str], str]
) -> Iterator[None]:
    """Within the block, a process that waits for others in vain ends all the same.

    Python answers a signal between two of its own steps, and a process that waits for another one
    takes none. So a thread looks as well.

    Args:
        trainer: Of the command.
        tidy: Puts in order what the command must not leave.
        told: What to say of an end, for the user.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, Launcher) or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def tidy_all() -> None:
        launcher.kill(signal.SIGKILL)
        tidy()

    over = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(over, reading, launcher, told), daemon=True)
    watch.start()
    try:
        with stopping.tidying(tidy_all):
            yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        watch.join(2 * _BEAT)
        os.close(writing)


def _watch(
    over: threading.Event, reading: int, launcher: Launcher, told: Callable[[str], str]
) -> None:
    """Waits for the first signal or loss, and then for the end of the block."""
    stop: Stopped | None = None
    while stop is None and not over.is_set():
        stop = _signal_in(reading) or launcher.lost()
    os.close(reading)
    if stop is None or over.wait(GRACE):
        return
    stop.told = told(stop.what)
    stopping.end(stop)


def _signal_in(reading: int) -> Stopped | None:
    """The signal that came within a beat, even if Python could not answer it yet."""
    if not select.select([reading], [], [], _BEAT)[0]:
        return None
    came = [each for each in os.read(reading, 64) if each in stopping.SIGNALS]
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    return Stopped(came[0]) if came and not stopping.is_requeued_in(main) else None


def stop_behind(error: BaseException) -> Stopped | None:
    """What stopped a command; None of an error of its own. Lightning makes others of it."""
    if stopping.received() is not None:
        return stopping.received()
    if isinstance(error, SIGTERMException):  # a SystemExit of status 0, as if the run were done
        return Stopped(signal.SIGTERM)
    stop = None if isinstance(error, Exception) else behind(error, KeyboardInterrupt)
    return stop if stop is None or isinstance(stop, Stopped) else Stopped()


def _leave_wakeups() -> None:
    with suppress(ValueError):  # a fork of another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_wakeups)  # signals of a worker are not the command's
