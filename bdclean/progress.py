"""How far long work is: a bar on a terminal, plain lines elsewhere, both with a rate and an end."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

FIRST_LINE = 10.0
"""Seconds until the first line, where there is no terminal."""
BETWEEN_LINES = 30.0
"""Seconds between two lines after that, at least. The longer the work, the more."""
_SHARE, _MOST = 0.02, 600.0  # of the time so far, and in seconds

_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


class Pace:
    """Says when a line of progress is due: early once, so that an end is known, then rarely.

    Attributes:
        start: When the work began, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self._next = self.start + FIRST_LINE

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def due(self) -> bool:
        """Whether to print a line now; that line is then taken for printed."""
        now = time.perf_counter()
        if now < self._next:
            return False
        self._next = now + min(_MOST, max(BETWEEN_LINES, _SHARE * (now - self.start)))
        return True


def follow(
    counts: Iterable[int],
    total: int,
    what: str,
    *,
    unit: str = "images",
    brief: bool = False,
    show: bool = True,
) -> None:
    """Runs through `counts` and shows on standard error how much of `total` is done.

    Args:
        counts: Numbers of things, each as soon as they are done.
        total: Their sum.
        what: Begins the line.
        unit: What is counted, in the plural.
        brief: Print nothing of work that ends before its first line is due.
        show: Print anything; False for all processes but the first.
    """
    if not show:
        for _ in counts:
            pass
        return
    with _shown(total, what, unit, brief=brief) as advance:
        for count in counts:
            advance(count)


Advance = Callable[[int], None]
"""Counts things that are done."""
Watch = Callable[[int, str, str], AbstractContextManager[Advance]]
"""`watch`, or what takes its place."""


def watch(total: int, what: str, unit: str) -> AbstractContextManager[Advance]:
    """Shows on standard error how far work is that counts what it has done.

    Work that ends before its first line is due shows none, and a bar goes at its end.

    Args:
        total: How much there is to do, at most.
        what: Begins the line.
        unit: What is counted, in the plural.
    """
    return _shown(total, what, unit, brief=True)


@contextmanager
def unwatched(total: int, what: str, unit: str) -> Iterator[Advance]:
    """As `watch`, and shows nothing."""
    yield lambda _: None


def _shown(total: int, what: str, unit: str, *, brief: bool) -> AbstractContextManager[Advance]:
    shown = _bar if sys.stderr.isatty() else _lines
    return shown(total, what, unit, brief)


def standing(done: int, total: int, seconds: float, unit: str) -> str:
    """How far it is, how fast, and how long it still takes.

    Args:
        done: Things that are done, of `total`.
        total: All of them.
        seconds: That the done ones took.
        unit: What is counted, in the plural.
    """
    speed, left = rate(done, seconds, unit), time_left(done, total, seconds)
    return f"{done:,}/{total:,} {unit}  {speed}  {duration(seconds)} passed, {left}"


def rate(count: float, seconds: float, unit: str) -> str:
    """How many a second, with three digits or all of a whole number: `12.3 it/s`."""
    speed = count / max(1e-9, seconds)
    digits = 0 if speed >= 100 else 1 if speed >= 10 else 2
    return f"{speed:,.{digits}f} {unit}/s"


def time_left(done: float, total: float, seconds: float) -> str:
    """An estimate from the mean speed so far: `1 h 20 min left`.

    Args:
        done: Of `total`; above 0.
        total: The whole.
        seconds: That the done part took.
    """
    return f"{duration(seconds * max(0.0, total - done) / max(1e-9, done))} left"


def duration(seconds: float) -> str:
    """In the two largest units: `8 s`, `3 min 20 s`, `1 h 20 min`, `2 d 4 h`."""
    for size, name, small, smaller in _UNITS:
        whole, rest = divmod(round(seconds / small), size // small)
        if whole:
            return f"{whole} {name} {rest} {smaller}" if rest else f"{whole} {name}"
    return f"{seconds:.0f} s"


@contextmanager
def _lines(total: int, what: str, unit: str, brief: bool) -> Iterator[Advance]:
    done, told, pace = 0, not brief, Pace()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        due = pace.due()
        told |= due
        if due or (told and done == total):
            line = f"{what}: {standing(done, total, pace.seconds, unit)}"
            with suppress(OSError):  # a full disk under a log ends no work
                print(line, file=sys.stderr, flush=True)

    yield advance


@contextmanager
def _bar(total: int, what: str, unit: str, brief: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.speed or 0.0, 1.0, unit))

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=brief) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
