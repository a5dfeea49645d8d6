"""One command at a time in a run folder.

The lock is one small file. It says who holds it, and its time of change says that the holder
lives: a thread renews it. What a killed command leaves behind is recognised and taken over.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from bdclean.errors import ConfigError, FileError

NAME = ".lock"
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
        """What a lock says; None where it is not whole."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

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

    def refuse_if_held(self) -> None:
        """Looks, and touches nothing.

        Raises:
            ConfigError: If another command is at work in the folder.
        """
        found = self._read()
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
            raise FileError(f"{self.file} cannot be written: {error.strerror or error}.") from error
        except ConfigError:
            self._leave_folders()
            raise
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the lock back."""
        if os.getpid() != self._mine.pid:
            return
        self._over.set()
        if self._read() == self._text():
            with suppress(OSError):
                self.file.unlink()
        self._leave_folders()

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
            file = self.file.open("r+", encoding="utf-8")
        except FileNotFoundError:  # it was given back just now
            return False
        with file:
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
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except OSError:
            return False

    def _read(self) -> str | None:
        try:
            return self.file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def _is_held(self, text: str) -> bool:
        age, holder = self._age(), Holder.of(text)
        return age < PATIENCE if holder is None else holder.lives(self._mine, age)

    def _age(self) -> float:
        try:
            return time.time() - self.file.stat().st_mtime
        except OSError:  # it was given back just now
            return PATIENCE

    def _renew(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):
                os.utime(self.file)

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
