"""Runs work in a process of its own that needs no imports, and ends it by a signal at a moment."""

import os
import signal
import sys
import time
import traceback
import warnings

from lightning.pytorch.callbacks import Callback


def fork(work, log):
    """Starts `work()` in a copy of this process; what it prints goes into `log`. Gives its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        file = log.open("w", buffering=1)
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        warnings.simplefilter("ignore")
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid, seconds=240):
    """The status with which a process ends; minus its number where a signal has ended it."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the process does not end")
        time.sleep(0.01)


def forked(work, log):
    """Runs `work()` in a copy of this process; gives its status."""
    return wait(fork(work, log))


class Send(Callback):
    """Sends this process a signal when a hook is called for the n-th time."""

    def __init__(self, hook, count, signum):
        self.left, self.signum = count, signum
        setattr(self, hook, self.hook)

    def hook(self, trainer, *_, **__):
        if trainer.sanity_checking:
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)
