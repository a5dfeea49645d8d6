"""How far a long command is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable

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

SECONDS_BETWEEN_LINES = 5.0


class _Rate(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


def follow(counts: Iterable[int], total: int, what: str) -> None:
    """Runs through `counts` and shows on standard error how much of `total` is done.

    Args:
        counts: Numbers of images, each as soon as they are done.
        total: Their sum.
        what: Begins the line.
    """
    if sys.stderr.isatty():
        _bar(counts, total, what)
    else:
        _lines(counts, total, what)


def _bar(counts: Iterable[int], total: int, what: str) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        for count in counts:
            bar.advance(task, count)


def _lines(counts: Iterable[int], total: int, what: str) -> None:
    """A line every few seconds, and one at the end."""
    done, start = 0, time.perf_counter()
    shown = start
    for count in counts:
        done += count
        now = time.perf_counter()
        if done == total or now - shown >= SECONDS_BETWEEN_LINES:
            rate = done / max(1e-9, now - start)
            line = f"{what}: {done:,}/{total:,} images  {rate:,.0f} images/s  "
            line += f"{now - start:.0f} s passed, {(total - done) / rate:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            shown = now
