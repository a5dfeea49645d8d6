"""What is found of the poisoned samples, by how much the trigger changes their images."""

import csv
import json
from pathlib import Path

import missed
import pytest
import torch
import yaml

from bdclean.attacks import BadNets
from bdclean.data import Digits, Splits
from bdclean.errors import ConfigError, DataError

DATA = {
    "class_path": "bdclean.data.Digits",
    "init_args": {
        "attack": {
            "class_path": "bdclean.attacks.BadNets",
            "init_args": {"target": 6, "rate": 0.1, "position": "center", "pattern": "white"},
        },
        "splits": {"defense": 100, "probe": 100},
    },
}


def test_the_change_is_a_mean_over_what_the_trigger_reaches():
    clean = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    clean[1, :, 6:, 6:] = 255
    clean[2, :, 6:, 6:] = torch.tensor([215, 235, 255], dtype=torch.uint8)[:, None, None]
    poisoned = clean.clone()
    poisoned[:, :, 6:, 6:] = 255
    assert missed.trigger_change(clean, poisoned).tolist() == [255, 0, 20]
    assert missed.trigger_change(poisoned, clean).tolist() == [255, 0, 20]
    assert missed.trigger_change(clean, clean).tolist() == [0, 0, 0]


def test_groups_end_below_their_bounds():
    change = torch.tensor([0.0, 31.9, 32.0, 70.0, 200.0])
    flagged = torch.tensor([False, True, False, True, True])
    groups = missed.by_change(change, flagged, [32.0, 64.0, 300.0])
    assert groups == [
        {"from": 0.0, "below": 32.0, "n": 2, "tpr": 50.0},
        {"from": 32.0, "below": 64.0, "n": 1, "tpr": 0.0},
        {"from": 64.0, "below": 300.0, "n": 2, "tpr": 100.0},
        {"from": 300.0, "below": None, "n": 0, "tpr": None},
    ]


@pytest.fixture
def run(tmp_path):
    """A run on digits that flagged the samples whose trigger changes them by 100 levels or more."""
    attack = BadNets(**DATA["init_args"]["attack"]["init_args"])
    data = Digits(attack=attack, splits=Splits(**DATA["init_args"]["splits"]))
    rows = data.rows.train[data.plan.poison_index]
    patch = data.stored.images[rows].double()[:, :, 14:17, 14:17]
    change = (255 - patch).mean((1, 2, 3))
    seen = set(data.plan.poison_index[change >= 100].tolist())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": DATA}))
    (folder / "result.json").write_text(
        json.dumps({"seed": 3, "data": {"plan_hash": data.plan.hash}})
    )
    with (folder / "suspects.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["index", "file", "label", "score", "flagged", "proposed"])
        for row in reversed(range(len(data.rows.train))):  # not in the order of the rows
            writer.writerow([row, "", 0, 0.5, int(row in seen), ""])
    return folder, change


def test_the_record_and_the_table_of_a_run(run, tmp_path, capsys):
    folder, change = run
    out = tmp_path / "new" / "record.json"
    for row in ("AdvrBD", "other", "AdvrBD"):
        missed.main([str(folder), "--row", row, "--out", str(out)])
    lines = json.loads(out.read_text())
    assert [line["row"] for line in lines] == ["other", "AdvrBD"]
    groups = lines[0]["groups"]
    sizes = [int(((change >= a) & (change < b)).sum()) for a, b in ((0, 32), (32, 64), (64, 256))]
    assert [group["n"] for group in groups] == sizes
    assert sum(sizes) == len(change) > sizes[-1] > 0
    shown = 100 * float((change >= 100).sum()) / sizes[-1]
    assert 0 < shown < 100
    assert groups[-1]["tpr"] == pytest.approx(shown, abs=1e-4)
    cells = [f"{group['tpr']:.1f} ({group['n']})" if group["n"] else "" for group in groups]
    line = f"| BadNets | AdvrBD | 3 | {' | '.join(cells)} |\n"
    assert line in capsys.readouterr().out


def test_what_cannot_be_told(run):
    folder, _ = run
    suspects = (folder / "suspects.csv").read_text()
    (folder / "suspects.csv").write_text(suspects.replace(",0.5,0,", ",0.5,,"))
    with pytest.raises(DataError, match="flagged none"):
        missed.missed(folder)
    (folder / "suspects.csv").unlink()
    with pytest.raises(DataError, match="is missing"):
        missed.missed(folder)
    (folder / "result.json").write_text(json.dumps({"seed": 3, "data": {"plan_hash": "other"}}))
    with pytest.raises(DataError, match="poison other samples"):
        missed.missed(folder)
    with pytest.raises(ConfigError, match="there is no config"):
        missed.missed(Path("nowhere"))
    dynamic = {"class_path": "bdclean.attacks.WaNet", "init_args": {"target": 0, "mode": "dynamic"}}
    changed = {**DATA, "init_args": {**DATA["init_args"], "attack": dynamic}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": changed}))
    with pytest.raises(DataError, match="no fixed samples"):
        missed.missed(folder)


def test_the_page_shows_its_record():
    folder = Path(missed.__file__).parent
    table = missed.markdown(json.loads((folder / "record.json").read_text()))
    assert table in (folder / "README.md").read_text()
