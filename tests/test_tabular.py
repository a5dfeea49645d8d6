"""CSV files of ours: what is written is read back, and no cell is a formula."""

import csv
from pathlib import Path

import pytest
import torch

import bdclean
from bdclean.callbacks.suspects import table
from bdclean.tabular import Number, csv_text, read_csv
from bdclean.types import Findings, TrainingSet

NAMES = (
    *("=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "'quoted", "''twice"),
    *("plain", "", 'comma, "quotes"', "new\nline", "\x1b[31mred", "back\\slash", "\\x1b", "\\t"),
    *("caf\udce9.png", "図.png", "-5", "1e5", "nan", " =1", "\x9b"),
)

NO_ROUNDS = (torch.zeros(0, 2, dtype=torch.bool), torch.zeros(0, dtype=torch.long))


def written(tmp_path, lines):
    path = tmp_path / "x.csv"
    path.write_bytes(csv_text(lines).encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back_and_is_no_formula(name, tmp_path):
    path = written(tmp_path, [("file", "n"), (name, 3)])
    assert read_csv(path) == [{"file": name, "n": "3"}]
    with path.open(errors="surrogateescape", newline="") as lines:
        shown = list(csv.reader(lines))[1][0]
    assert not shown.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert "\x1b" not in shown


def test_numbers_are_written_as_they_are():
    assert csv_text([(1, -0.5, Number("-1.5e-07"), None)]) == "1,-0.5,-1.5e-07,\n"


def test_names_of_suspects_are_those_of_the_files(tmp_path):
    """A class folder that a spreadsheet would run."""
    files = ("=cmd|' /C calc'!A0/0.png", "cat/-1.png")
    truth = TrainingSet(torch.tensor([0, 1]), files, None, None, ("=cmd|' /C calc'!A0", "cat"))
    score, flagged = torch.tensor([-1.0, -2.0]), torch.tensor([True, False])
    text = table(Findings(score, flagged, torch.tensor([1, -1]), {}, *NO_ROUNDS), truth)
    assert "\n0,'=cmd|" in text
    (tmp_path / "suspects.csv").write_text(text)
    first, second = read_csv(tmp_path / "suspects.csv")
    assert (first["file"], first["label_name"], first["score"]) == (files[0], files[0][:-6], "-1")
    assert second["file"] == files[1]


def test_no_other_place_writes_csv_files():
    package = Path(bdclean.__file__).parent
    words = ("csv.writer", "csv.DictWriter", "to_csv", "savetxt")
    found = {
        file.name for file in package.rglob("*.py") if any(w in file.read_text() for w in words)
    }
    assert found == {"tabular.py"}
