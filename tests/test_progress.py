"""Progress is a bar on a terminal and lines elsewhere."""

import sys
from itertools import pairwise

import pytest

from bdclean import progress


def test_lines_tell_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    progress.follow(iter([1000, 500, 500]), 2000, "train")
    said = capsys.readouterr()
    assert said.out == ""
    heads = [line.split(" images  ")[0] for line in said.err.splitlines()]
    assert heads == ["train: 1,000/2,000", "train: 1,500/2,000", "train: 2,000/2,000"]
    assert said.err.endswith(", 0 s left\n")


def test_short_work_prints_its_end_alone(capsys):
    progress.follow(iter([1, 1]), 2, "test")
    assert capsys.readouterr().err.startswith("test: 2/2 images")


def test_short_work_may_say_nothing(capsys, monkeypatch):
    progress.follow(iter([1, 1]), 2, "test", brief=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    progress.follow(iter([1, 1]), 2, "test", brief=True)
    heads = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert heads == ["test: 1/2 images", "test: 2/2 images"]  # who has begun tells the end


def test_other_processes_work_and_say_nothing(capsys):
    counts = iter([1, 1])
    progress.follow(counts, 2, "test", show=False)
    assert next(counts, None) is None
    assert capsys.readouterr().err == ""


def test_the_first_line_comes_early_and_the_others_rarely(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    pace = progress.Pace()
    due = []
    for now in range(100, 200):
        if pace.due():
            due.append(now - 100)
    assert due == [10, 40, 70]
    assert due[0] <= 30
    assert pace.seconds == 99
    for now in range(100, 86_500, 10):
        if pace.due():
            due.append(now - 100)
    assert len(due) < 300  # lines of a day
    assert max(b - a for a, b in pairwise(due)) <= 610


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.9, "1 h"),
        (4800, "1 h 20 min"),
        (86_399, "1 d"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [(24.6, 2, "12.3 it/s"), (1, 4, "0.25 it/s"), (4690, 2, "2,345 it/s")],
)
def test_rates_have_three_digits(count, seconds, text):
    assert progress.rate(count, seconds, "it") == text


def test_an_end_is_estimated_from_the_mean_speed():
    assert progress.time_left(25, 100, 1600) == "1 h 20 min left"
    line = "1,000/4,000 images  50.0 images/s  20 s passed, 1 min left"
    assert progress.standing(1000, 4000, 20, "images") == line


def test_a_terminal_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    progress.follow(iter([3, 4]), 7, "train")
    said = capsys.readouterr().err
    assert "train" in said
    assert "7/7" in said
    assert "images/s" in said


def test_an_error_in_the_work_is_not_swallowed():
    def broken():
        yield 1
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        progress.follow(broken(), 2, "train")


def test_watched_work_tells_how_far_it_is_and_short_work_nothing(capsys, monkeypatch):
    with progress.watch(2, "MM-BD", "classes") as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    with progress.watch(3, "MM-BD", "classes") as advance:
        advance(1)
        advance(2)
    heads = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert heads == ["MM-BD: 1/3 classes", "MM-BD: 3/3 classes"]
    with progress.unwatched(1, "MM-BD", "classes") as advance:
        advance(1)
    assert capsys.readouterr().err == ""
