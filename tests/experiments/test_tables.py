"""Tables of the documentation come from records, and say when they are stale."""

import json
import statistics
from pathlib import Path

import pytest

from bdclean.errors import DataError
from bdclean.experiments import tables

ROOT = Path(__file__).parents[2]


def record(acc, labels="none"):
    return {
        "metrics": {"acc": acc, "asr": 10.0, "pa": 70.0},
        "protocol": {"labels": labels},
        "cost": {"train_seconds": 60.0},
    }


@pytest.fixture
def folder(tmp_path):
    for name, acc in (("badnets-s0", 80.0), ("badnets-s1", 84.0), ("blend-s0", 50.0)):
        file = tmp_path / "table" / "2-cbd" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record(acc)))
    first = tmp_path / "table" / "1-victim" / "badnets-s0.json"
    first.parent.mkdir()
    first.write_text(json.dumps(record(90.0, "train")))
    (tmp_path / "table" / "about.md").write_text("## A table\n\nWhat it shows.\n")
    return tmp_path


def test_rows_and_spread(folder):
    rows = tables.read_table(folder / "table")
    assert list(rows) == ["victim", "cbd"]
    assert (
        rows["cbd"]["badnets"].text("metrics", "acc") == f"82.0 ± {statistics.stdev([80, 84]):.1f}"
    )
    assert rows["cbd"]["blend"].text("metrics", "acc") == "50.0"
    text = tables.markdown(rows)
    assert "| badnets | victim | train | 1 | 90.0 | 10.0 | 70.0 | 60 |" in text
    assert text.index("victim") < text.index("cbd")
    assert "TPR" not in text


def test_the_time_of_a_table_is_told(folder):
    file = folder / "table" / "2-cbd" / "badnets-s1.json"
    file.write_text(json.dumps(record(84.0) | {"cost": {"train_seconds": 6900.0}}))
    assert "\nAll its trainings took 2.0 hours.\n" in tables.document(folder)  # 3 times 60 s more


def test_benchmarks_have_a_section(folder):
    (folder / "demo.json").write_text("{}")  # no benchmark
    fast = {"what": "training", "width": 16, "batch_size": 64, "precision": "32-true"}
    fast |= {"threads": 2, "share_of_bare_median": 0.984}
    (folder / "speed.json").write_text(json.dumps(fast))
    assert tables.document(folder).endswith(
        "|---|---|---|---|---|---|\n| training | 16 | 64 | 32-true | 2 | 0.98 |\n"
    )


def test_what_was_found_has_columns_of_its_own(folder):
    found = record(70.0) | {"identification": {"tpr": 99.5, "fpr": 12.0, "auroc": 98.25}}
    clean = record(71.0) | {"identification": {"tpr": None, "fpr": 3.0, "auroc": None}}
    clean["metrics"].pop("asr")
    for name, entry in (("badnets-s0", found), ("none-s0", clean)):
        file = folder / "table" / "3-sifted" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(entry))
    text = tables.markdown(tables.read_table(folder / "table"))
    assert "| ACC | ASR | PA | TPR | FPR | AUROC | seconds |" in text
    assert "| badnets | sifted | none | 1 | 70.0 | 10.0 | 70.0 | 99.5 | 12.0 | 98.2 | 60 |" in text
    assert "| none | sifted | none | 1 | 71.0 |  | 70.0 |  | 3.0 |  | 60 |" in text
    assert "| badnets | victim | train | 1 | 90.0 | 10.0 | 70.0 |  |  |  | 60 |" in text


def test_courses_of_training_stand_below_their_table(folder):
    (folder / "table" / "badnets.csv").write_text(
        "epoch,step,train/loss,val/probe_acc,val/probe_asr\n"
        "0,9,5.0,,\n0,10,,40.25,\n4,50,,52.0,11.04\n"
    )
    (folder / "table" / "blend.csv").write_text("epoch,step,val/knn_acc\n4,50,33.3\n")
    assert tables.courses(folder / "table") == (
        "| attack | epoch | probe acc | probe asr | knn acc |\n"
        "|---|---|---|---|---|\n"
        "| badnets | 1 | 40.2 |  |  |\n"
        "| badnets | 5 | 52.0 | 11.0 |  |\n"
        "| blend | 5 |  |  | 33.3 |\n"
    )
    assert "| badnets | 5 | 52.0 |" in tables.document(folder)


def test_pages_are_written_and_checked(folder):
    readme = folder / "README-of-project.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end results -->\nafter\n")
    words = [str(folder), "--readme", str(readme)]
    with pytest.raises(SystemExit):
        tables.main([*words, "--check"])
    tables.main(words)
    tables.main([*words, "--check"])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "What it shows." in text
    assert "82.0" in text


def test_a_wrongly_named_record_is_refused(folder):
    (folder / "table" / "2-cbd" / "nameless.json").write_text("{}")
    with pytest.raises(DataError, match="ATTACK-sSEED"):
        tables.read_table(folder / "table")


def test_the_pages_of_this_repository_are_what_their_records_give():
    tables.main([str(ROOT / "docs/results"), "--readme", str(ROOT / "README.md"), "--check"])


def test_facts_beside_the_records(folder):
    file = folder / "table" / "beside.json"
    facts = {"columns": ["published", "why"], "attacks": {"badnets": ["93 / 100", "short"]}}
    facts["attacks"]["badnets/cbd"] = ["88 / 1", ""]
    file.write_text(json.dumps(facts))
    text = tables.document(folder)
    assert "| 60 | 88 / 1 |  |\n" in text
    assert "| PA | seconds | published | why |\n|---|" in text
    assert "| badnets | victim | train | 1 | 90.0 | 10.0 | 70.0 | 60 | 93 / 100 | short |" in text
    assert "| blend | cbd | none | 1 | 50.0 | 10.0 | 70.0 | 60 |  |  |" in text
    file.write_text(json.dumps({"columns": ["published"], "attacks": {"badnets": []}}))
    with pytest.raises(DataError, match="badnets needs one text"):
        tables.document(folder)
