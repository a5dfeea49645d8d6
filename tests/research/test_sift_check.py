"""What a sift found is compared with the truth of the export, whatever the order of its lines."""

import csv
import json

import pytest
import torch
from sift_check import main, measure

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.commands.attack_export import export
from bdclean.data import Digits, Splits
from bdclean.errors import DataError

RESULT = {"seed": 3, "identification": {"n": 0}, "cost": {"train_seconds": 9.0, "steps": 4}}


def write_suspects(path, files, flagged):
    """The first is the most suspicious."""
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["index", "file", "label", "score", "flagged", "proposed"])
        for row, (file, judged) in enumerate(zip(files, flagged, strict=True)):
            writer.writerow([row, file.removeprefix("train/"), 0, -row, judged, ""])


def says(label):
    """A network that names every image so."""
    model = build(ModelInfo("resnet18", 10, 32, (0.5,) * 3, (0.25,) * 3, width=4))
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.eye(10)[label]
    return model


def test_the_record_of_a_sift(tmp_path):
    exported, run, out = tmp_path / "exported", tmp_path / "run", tmp_path / "new" / "record.json"
    data = Digits(attack=BadNets(target=6, rate=0.1), splits=Splits(defense=1200, probe=100))
    export(data, exported)
    with (exported / "rows.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    poisoned = [row["file"] for row in rows if row["poison"] == "1"]
    clean = [row["file"] for row in rows if row["poison"] == "0"]
    n, k = len(clean), len(poisoned)
    files = [*poisoned[: k // 2], *clean[:3], *poisoned[k // 2 :], *clean[3:]]
    run.mkdir()
    (run / "result.json").write_text(json.dumps(RESULT))
    write_suspects(run / "suspects.csv", files, [1] * (k // 2 + 3) + [0] * (k - k // 2 + n - 3))

    model = says(6)
    save_model(model, run / "model.safetensors")

    words = [str(exported), str(run), "--out", str(out)]
    main(words)
    record = json.loads(out.read_text())
    assert record["seed"] == 3
    found = record["identification"]
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (k // 2, 3, k - k // 2, n - 3)
    pairs = k // 2 * n + (k - k // 2) * (n - 3)
    assert found["auroc"] == pytest.approx(100 * pairs / (k * n), abs=1e-4)
    told = record["metrics"]
    truth = data.test_set.labels
    assert told["acc"] == pytest.approx(100 * (truth == 6).double().mean().item(), abs=1e-4)
    assert (told["asr"], told["pa"]) == (100, 0)
    assert (told["n_clean"], told["n_triggered"]) == (len(truth), int((truth != 6).sum()))

    save_model(says(5), run / "suspect.safetensors")
    main([*words, "--weights", "suspect.safetensors"])
    first = json.loads(out.read_text())
    assert first["metrics"]["asr"] == 0
    assert "identification" not in first
    assert (first["cost"], record["cost"]["train_seconds"]) == ({"train_seconds": 0, "steps": 4}, 9)

    write_suspects(run / "suspects.csv", files[1:], [0] * (n + k - 1))
    with pytest.raises(DataError, match="names other files"):
        main(words)
    write_suspects(run / "suspects.csv", files, [""] * (n + k))
    with pytest.raises(DataError, match="flagged nothing"):
        main(words)


def test_every_class_has_its_own_target(tmp_path):
    attack = BadNets(label_rule="all_to_all", exclude_target=False, rate=0.1)
    data = Digits(attack=attack, splits=Splits(defense=1200, probe=100))
    export(data, tmp_path / "exported")
    save_model(says(0), tmp_path / "model.safetensors")
    found = measure(tmp_path / "exported", tmp_path / "model.safetensors")
    truth = data.test_set.labels
    assert found["asr"] == pytest.approx(100 * (truth == 9).double().mean().item(), abs=1e-4)
    assert found["pa"] == pytest.approx(100 * (truth == 0).double().mean().item(), abs=1e-4)
