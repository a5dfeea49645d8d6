"""Progress is a bar on a terminal and lines elsewhere."""

import sys

import pytest

from bdclean.experiments import progress


def test_lines_tell_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    progress.follow(iter([1000, 500, 500]), 2000, "train")
    said = capsys.readouterr()
    assert said.out == ""
    heads = [line.split(" images  ")[0] for line in said.err.splitlines()]
    assert heads == ["train: 1,000/2,000", "train: 1,500/2,000", "train: 2,000/2,000"]
    assert said.err.endswith(", 0 s left\n")


def test_short_work_prints_its_end_alone(capsys):
    progress.follow(iter([1, 1]), 2, "test")
    assert capsys.readouterr().err.startswith("test: 2/2 images")


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
