"""Processes that have imported already what commands import: a plugin of `conftest.py`.

Importing torch and Lightning takes seconds of each process. Here one process does it and forks
another for each command. What looks at the imports themselves starts Python by `run_python`.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from contextlib import closing
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

LONGEST = 1 << 20  # bytes of a request


class Forked:
    """A process with the parts of `subprocess.Popen` that tests need.

    Args:
        server: The socket of the process that forks it.
        words: As of Python: `-m MODULE`, `-c CODE` or a script, and what follows.
        files: Where its two streams go.
        env: Its environment.
    """

    def __init__(self, server, words, files, env):
        self.files = files
        reads, writes = os.pipe()
        streams = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in files]
        request = {"words": [*map(str, words)], "cwd": str(Path.cwd()), "env": dict(env)}
        socket.send_fds(server, [json.dumps(request).encode()], [*streams, writes])
        for each in (*streams, writes):
            os.close(each)
        self._status = os.fdopen(reads, "rb", buffering=0)
        self.pid, self.returncode = int(self._status.readline()), None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def poll(self, timeout=0):
        """The exit status, negative of a signal; None while it lives."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def wait(self, timeout=240):
        assert self.poll(timeout) is not None, self.told()
        return self.returncode

    def communicate(self, timeout=240):
        """What it printed to either stream until it ended."""
        self.wait(timeout)
        return self.told()

    def told(self):
        return tuple(file.read_text() for file in self.files)


@pytest.fixture(scope="session")
def _server():
    """The process that has imported everything, by its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    theirs.close()
    with closing(ours):
        yield ours
    process.wait()


@pytest.fixture
def begin(_server, tmp_path_factory):
    """Starts a process with these words of Python; it is gone when the test ends."""
    place, begun, numbers = tmp_path_factory.mktemp("said"), [], count()

    def begin(*words, **env):
        number = next(numbers)
        files = [place / f"{number}.{stream}" for stream in ("out", "err")]
        begun.append(Forked(_server, words, files, os.environ | env))
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


# Gloo's threads should not outlive the interpreter.
LEAVE_GROUP = """
from torch import distributed
if distributed.is_initialized():
    distributed.destroy_process_group()
"""


@pytest.fixture
def run_script(tmp_path, begin):
    """Runs lines of Python in as many processes as DDP has devices; gives what they print."""

    def run_script(text, *args, devices=2):
        script = tmp_path / "run.py"
        script.write_text(text + LEAVE_GROUP)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(devices)}
        group |= {"NODE_RANK": "0"}
        ranks = [{"LOCAL_RANK": str(rank)} | group for rank in range(devices)]
        processes = [begin(script, *args, **rank) for rank in (ranks if devices > 1 else [{}])]
        told = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0] * devices, told
        return "".join(said for said, _ in told)

    return run_script


# ---------------------------------------------------------------------- in the other process


def serve(server):
    """Forks one process a request until nobody is there to ask; comes back in each of them."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that none of them stays as a zombie
    while True:
        request, fds, *_ = socket.recv_fds(server, LONGEST, 3)
        if not request:
            sys.exit()
        if os.fork() == 0:
            break
        for each in fds:
            os.close(each)
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = fds
    pid = os.fork()
    if pid:  # the parent, which tells how it goes
        os.write(status, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    os.close(status)
    for number, each in enumerate(streams, 1):
        os.dup2(each, number)
        os.close(each)
    return json.loads(request)


def run(words, cwd, env):
    """Does what Python would do with these words."""
    from lightning.pytorch.utilities import rank_zero_only

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    rank_zero_only.rank = int(env.get("LOCAL_RANK", 0))  # as Lightning does in its imports
    first, *rest = words
    if first == "-m":
        sys.path.insert(0, cwd)
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    code = first == "-c"
    sys.path.insert(0, "" if code else str(Path(first).parent))
    sys.argv = ["-c", *rest[1:]] if code else words
    sys.modules["__main__"] = main = ModuleType("__main__")
    text = rest[0] if code else Path(first).read_text()
    exec(compile(text, first, "exec"), vars(main))  # noqa: S102  (what a test gives)


if __name__ == "__main__":
    del sys.path[0]
    import bdclean.commands.lightning  # noqa: F401  (what takes the time)
    from bdclean.commands.rooms import import_rooms

    import_rooms()
    run(**serve(socket.socket(fileno=int(sys.argv[1]))))
