"""Tiers are counted against the truth of an export, from files with and without the column."""

import json
from pathlib import Path

import pytest
import sift_tiers

from bdclean.errors import DataError
from bdclean.tabular import csv_text

KINDS, SIZE, POISONED = 8, 200, 70


def write(folder, judged="1"):
    """Poisoned images of class 1 are named as all others; of each class one more is flagged."""
    lines, truth = [], []
    for label in range(KINDS):
        for number in range(SIZE):
            row, bad = label * SIZE + number, label == 1 and number < POISONED
            seen = bad or number == SIZE - 1
            name = (2 + number % 7) % KINDS if bad else (label + 1) % KINDS
            flag = judged and str(int(seen))
            file = f"k{label}/{number}.png"
            lines.append([row, file, label, -row, flag, name if seen else ""])
            truth.append([f"train/{file}", int(bad)])
    head = ["index", "file", "label", "score", "flagged", "proposed"]
    (folder / "suspects.csv").write_text(csv_text([head, *lines]))
    (folder / "rows.csv").write_text(csv_text([["file", "poison"], *reversed(truth)]))


def test_the_tiers_are_compared_with_the_truth(tmp_path, capsys):
    write(tmp_path)
    out = tmp_path / "record.json"
    words = [str(tmp_path), "--use", "check", "--out", str(out)]
    sift_tiers.main([*words, "--set", "Patch", "--truth", str(tmp_path)])
    (line,) = json.loads(out.read_text())
    assert (line["n"], line["n_poisoned"], line["target"], line["attacked"]) == (1600, 70, 1, 1)
    assert line["likely"] == {"n": 71, "precision": 98.59, "recall": 100.0}
    assert line["possible"] == {"n": 7, "precision": 0.0, "recall": 0.0}
    assert line["flagged"]["n"] == 78
    few = line["fewer"]["6"]
    assert (few["draws"], few["right"], few["wrong"]) == (sift_tiers.DRAWS, sift_tiers.DRAWS, 0)
    sift_tiers.main([*words, "--set", "Clean"])
    sift_tiers.main([*words, "--set", "Patch", "--truth", str(tmp_path)])
    clean, patch = json.loads(out.read_text())
    assert (clean["set"], clean["n_poisoned"], clean["likely"]["recall"]) == ("Clean", 0, None)
    assert patch == line
    table = capsys.readouterr().out.splitlines()[-1]
    assert table.startswith("| Patch | check | 1,600 | 70 | right | ")
    assert table.endswith(" | 78: 90 / 100 | 71: 99 / 100 | 7: 0 / 0 |")


def test_what_cannot_be_compared(tmp_path):
    write(tmp_path, judged="")
    with pytest.raises(DataError, match="scored samples and flagged none"):
        sift_tiers.judge(tmp_path / "suspects.csv", None)
    write(tmp_path)
    (tmp_path / "rows.csv").write_text("file,poison\ntrain/k0/0.png,1\n")
    with pytest.raises(DataError, match="is not about the files of the run"):
        sift_tiers.judge(tmp_path / "suspects.csv", tmp_path / "rows.csv")


def test_the_page_shows_its_record():
    folder = Path(sift_tiers.__file__).parent
    lines = json.loads((folder / "record.json").read_text())
    page = (folder / "README.md").read_text()
    assert sift_tiers.markdown(lines) in page
    assert sift_tiers.markdown_of_fewer(lines) in page
