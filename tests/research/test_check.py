"""What the tests of `check` see: judged by the present bounds, and the page of its record."""

import json
from pathlib import Path

import check

FOLDER = Path(check.__file__).parent


def line_of(attack, target, piled, trigger, p, gathered=0.1, bounds="set", rule=None):
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
        "rule": rule,
        "bounds": bounds,
        "metrics": {"acc": 80.0, "asr": None if attack is None else 99.0, "pa": None},
        "flips": [{"family": "patch", "images": 500, "landed": landed}],
        "gathered": [{"family": "patch", "images": 500, "share": gathered}],
        "trigger": {"share": trigger, "untouched": 0.6, "epochs": 9},
        "margins": {"largest": [1.0] * 6, "p": p, "target": 3, "z": 1.0},
    }


def test_lines_are_judged_and_counted():
    lines = [
        line_of("BadNets", 3, 0.9, 0.01, 0.2, gathered=0.9),
        line_of("Blend", 2, 0.9, 0.3, 0.009),
        line_of("BadNets", 3, 0.9, 0.3, 0.2, bounds="checked", rule="all_to_all"),
        line_of(None, None, 0.1, 0.3, 0.009, bounds="checked"),
        line_of(None, None, 0.1, 0.3, 0.02) | {"width": None},
    ]
    page = check.markdown(lines)
    heads, backbones = page.split("Of the backbones alone, without their heads:")
    rows = heads.splitlines()
    assert rows[2] == (
        "| checked | cifar10 | resnet18, width 8 | 0 | none | - | 80.0 | - | 10 | 30.0 | "
        "**p = 0.009** (3) |"
    )
    assert rows[3].startswith("| set | cifar10 | resnet18 | 0 | none |")
    assert "| BadNets | all | 80.0 | 99.0 | **90** (3) | 30.0 | p = 0.2 |" in rows[4]
    assert rows[5].endswith("| BadNets | 3 | 80.0 | 99.0 | **90** (3) | **1.0** | p = 0.2 |")
    told, checked = heads.split("| bounds checked |")
    assert "| bounds set | 2 attacked: suspicious | with the right target | 1 clean: susp" in told
    for row in "| patch | 2 | 1 | 0 |", "| DECREE | 1 | 0 | 0 |", "| MM-BD | 1 | 0 | 0 |":
        assert row in told
    assert "| any of them | 2 | 1 | 0 |" in told
    assert "| patch | 1 | 0 | 0 |" in checked
    assert "| MM-BD | 0 | 0 | 1 |" in checked
    assert "| BadNets | 3 | 80.0 | 99.0 | **90** | **1.0** |\n" in backbones
    assert "| any of them | 1 | 0 | 0 |" in backbones


def test_the_page_shows_its_record():
    lines = json.loads((FOLDER / "record.json").read_text())
    assert check.markdown(lines) in (FOLDER / "README.md").read_text()
