"""What the tests of `check` see: judged by the present bounds, and the page of its record."""

import json
from pathlib import Path

import check

FOLDER = Path(check.__file__).parent


def line_of(attack, target, piled, trigger, p):
    landed = [0] * 6
    landed[3] = round(500 * piled)
    return {
        "run": f"{attack}",
        "data": "cifar10",
        "arch": "resnet18",
        "width": 8,
        "seed": 0,
        "attack": attack,
        "target": target,
        "metrics": {"acc": 80.0, "asr": None if attack is None else 99.0, "pa": None},
        "flips": [{"family": "patch", "images": 500, "landed": landed}],
        "trigger": {"share": trigger, "untouched": 0.6, "epochs": 9},
        "margins": {"largest": [1.0] * 6, "p": p, "target": 3, "z": 1.0},
    }


def test_lines_are_judged_and_counted():
    lines = [
        line_of("BadNets", 3, 0.9, 0.01, 0.2),
        line_of("Blend", 2, 0.9, 0.3, 0.009),
        line_of(None, None, 0.1, 0.3, 0.009),
    ]
    page = check.markdown(lines)
    rows = page.splitlines()
    assert rows[2] == (
        "| cifar10 | resnet18, width 8 | 0 | none | - | 80.0 | - | 10 | 30.0 | **p = 0.009** (3) |"
    )
    assert rows[3].endswith("| BadNets | 3 | 80.0 | 99.0 | **90** (3) | **1.0** | p = 0.2 |")
    assert "| test | 2 attacked: suspicious | with the right target | 1 clean: suspicious |" in page
    assert "| patch | 2 | 1 | 0 |" in page
    assert "| DECREE | 1 | 0 | 0 |" in page
    assert "| MM-BD | 1 | 0 | 1 |" in page
    assert "| any of them | 2 | 1 | 1 |" in page


def test_the_page_shows_its_record():
    lines = json.loads((FOLDER / "record.json").read_text())
    assert check.markdown(lines) in (FOLDER / "README.md").read_text()
