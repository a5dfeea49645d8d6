"""One command at a time in a run folder.

The lock is one small file. It says who holds it, and its time of change says that the holder
lives: a thread renews it. What a killed command leaves behind is recognised and taken over. A
command whose lock is gone writes no more: another one may have begun in its folder.
"""

import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from bdclean.errors import BdcleanError, ConfigError, FileError

NAME = ".lock"
_LONGEST = 1 << 14  # bytes that are read of a lock
_MOST_PIDS = 1 << 31
_READ = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A link is not followed, and nobody waits for a pipe."""
BEAT = 20.0
"""Seconds after which a holder renews its lock."""
PATIENCE = 120.0
"""Seconds without renewal after which a holder on another machine counts as gone."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: The machine.
        space: Where the number of the process counts: containers of one machine have their own.
        pid: The process.
        started: When it began, as the system says it; a later process may get the same number.
        since: When it took the lock, for the user.
        job: Its SLURM job; None outside of SLURM.
        key: Tells two locks of one process apart.
    """

    host: str
    space: str
    pid: int
    started: str
    since: str
    job: str | None
    key: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(
            host=socket.gethostname(),
            space=_space(),
            pid=os.getpid(),
            started=started(os.getpid()) or "",
            since=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
            job=os.environ.get("SLURM_JOB_ID"),
            key=secrets.token_hex(8),
        )

    @classmethod
    def of(cls, text: str) -> Self | None:
        """What a lock says; None where it is not whole, or no command of ours wrote it."""
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        words = (found.host, found.space, found.started, found.since, found.job or "", found.key)
        whole = type(found.pid) is int and all(isinstance(word, str) for word in words)
        return found if whole and 0 < found.pid < _MOST_PIDS else None

    def lives(self, here: "Holder", age: float) -> bool:
        """Whether the process is still at work.

        Args:
            here: The process that asks.
            age: Seconds since the lock was renewed.
        """
        if (self.host, self.space) == (here.host, here.space):
            return started(self.pid) == self.started
        if self.job is not None and self.job == here.job:  # a job that was moved to this machine
            return False
        return age < PATIENCE


class RunLock:
    """Holds a run folder as long as the block lasts; the folder is made, and goes if it is empty.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / NAME
        self._mine = Holder.here()
        self._made: list[Path] = []
        self._over = threading.Event()
        self._lost = False

    def refuse_if_held(self) -> None:
        """Looks, and touches nothing.

        Raises:
            ConfigError: If another command is at work in the folder.
            FileError: If what lies there is no file, or cannot be read.
        """
        try:
            found = self._read()
        except OSError as error:
            raise FileError(f"{self.file} cannot be read: {error.strerror or error}.") from error
        if found is not None and self._is_held(found):
            raise ConfigError(self._refusal(found))

    def __enter__(self) -> Self:
        """Takes the lock; that of a command that is gone is taken over.

        Raises:
            ConfigError: If another command is at work in the folder.
            FileError: If the lock cannot be written.
        """
        self.refuse_if_held()
        above = (self.folder, *self.folder.parents)
        self._made = [folder for folder in above if not folder.exists()]  # the innermost first
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not (self._create() or self._take_over()):
                time.sleep(0.01)
        except OSError as error:
            self._leave_folders()
            raise FileError(
                f"--run {self.folder}: {self.file} cannot be written: {error.strerror or error}."
            ) from error
        except BdcleanError:
            self._leave_folders()
            raise
        _HELD.append(self)
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the lock back."""
        self.give_back()

    def give_back(self) -> None:
        """Gives the lock back, if it is still ours; another's folder is left alone."""
        if os.getpid() != self._mine.pid or self._over.is_set():
            return
        self._over.set()
        _HELD.remove(self)
        with suppress(OSError):
            if self._is_mine():
                self.file.unlink()
                self._leave_folders()

    def require_held(self) -> None:
        """Makes sure that the lock is still there and ours.

        Raises:
            ConfigError: If it is not, or was not at an earlier look.
        """
        if os.getpid() != self._mine.pid:  # a worker, which writes nothing of the run
            return
        with suppress(OSError):  # of a network that is away for a moment
            self._lost = self._lost or not self._is_mine()
        self.require_not_lost()

    def require_not_lost(self) -> None:
        """As `require_held`, by what the latest look or renewal has found; reads no file.

        Raises:
            ConfigError: If the lock was lost.
        """
        if self._lost:
            raise ConfigError(
                f"{self.folder}: the lock of this command is gone, so that another one may work in "
                "the folder; this one ends, and writes no more. Start it again with another --run."
            )

    # ------------------------------------------------------------------ the file

    def _text(self) -> str:
        return json.dumps(asdict(self._mine))

    def _create(self) -> bool:
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self._text())
        except BaseException:
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self) -> bool:
        """Writes our name over that of a command that is gone; of many that try, one succeeds."""
        try:
            handle = os.open(self.file, os.O_RDWR | _READ)
        except FileNotFoundError:  # it was given back just now
            return False
        with os.fdopen(handle, "r+", encoding="utf-8") as file:
            with suppress(OSError):  # file systems without such locks: what follows is quick
                fcntl.flock(file, fcntl.LOCK_EX)
            if not self._is_there(file.fileno()):
                return False
            self.refuse_if_held()
            file.truncate()
            file.write(self._text())
        return True

    def _is_there(self, descriptor: int) -> bool:
        """Whether an open file is the lock, and not one that was given back since."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.lstat())
        except OSError:
            return False

    def _read(self) -> str | None:
        """What the lock says; None without one.

        Raises:
            FileError: If it is a link, a folder, a pipe ...
            OSError: If it cannot be read.
        """
        try:
            if not stat.S_ISREG(self.file.lstat().st_mode):
                raise FileError(
                    f"{self.file} is no plain file, as a lock is; remove it, or name another "
                    "folder with --run."
                )
            with os.fdopen(os.open(self.file, os.O_RDONLY | _READ), "rb") as file:
                return file.read(_LONGEST).decode("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _is_mine(self) -> bool:
        try:
            return self._read() == self._text()
        except FileError:  # something else lies in its place
            return False

    def _is_held(self, text: str) -> bool:
        age, holder = self._age(), Holder.of(text)
        return age < PATIENCE if holder is None else holder.lives(self._mine, age)

    def _age(self) -> float:
        """Seconds since it was renewed; a time that is yet to come is as far away."""
        try:
            return abs(time.time() - self.file.lstat().st_mtime)
        except OSError:  # it was given back just now
            return PATIENCE

    def _renew(self) -> None:
        while not (self._lost or self._over.wait(BEAT)):
            with suppress(OSError):
                self._lost = not self._is_mine()
                if not self._lost:
                    os.utime(self.file, follow_symlinks=False)

    def _leave_folders(self) -> None:
        with suppress(OSError):  # it holds something
            for folder in self._made:
                folder.rmdir()

    def _refusal(self, text: str) -> str:
        holder = Holder.of(text)
        who = "" if holder is None else f" (process {holder.pid} on {holder.host})"
        since = "" if holder is None else f" since {holder.since}"
        return (
            f"{self.folder}: another command works in this folder{since}{who}; let it end, or "
            "name another folder with --run."
        )


_HELD: list[RunLock] = []
"""The locks that this process holds: one, but for programs of several threads."""


def require_held(file: Path | None = None) -> None:
    """Makes sure, before something is written, that the lock of its folder is still held.

    Args:
        file: What is written; None, where nothing is, looks at no file and asks what the latest
            renewal has found.

    Raises:
        ConfigError: If a lock of this process was lost.
    """
    for lock in tuple(_HELD):
        if file is None:
            lock.require_not_lost()
        elif file.absolute().is_relative_to(lock.folder.absolute()):
            lock.require_held()


def started(pid: int) -> str | None:
    """When a process of this machine began, in a unit of the system; None if there is none."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in ("Z", "X") else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # it is another user's
        pass
    return ""


def _space() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
