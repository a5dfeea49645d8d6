"""Pages of results come from records, and say when they are stale."""

import csv
import io
import json
import re
import statistics
from pathlib import Path

import pytest

from bdclean.reporting import Results, Table, tables

ROOT = Path(__file__).parents[2]


def test_rows_and_spread(folder):
    text = tables.markdown(Table.read(folder.table))
    assert text.splitlines()[0] == (
        "| attack | method | labels | seeds | ACC | ASR | PA | seconds |"
    )
    deviation = f"{statistics.stdev([80, 84]):.1f}"
    assert f"| BadNets | CBD, fast | none | 2 | 82.0 ± {deviation} | 10.0 ± 0.0 |" in text
    assert "| Blend | CBD, fast | none | 1 | 50.0 |" in text
    assert "| BadNets | victim | train | 1 | 90.0 | 10.0 | 70.0 | 60 |" in text
    assert text.index("victim") < text.index("CBD")
    assert "TPR" not in text


def test_rows_and_attacks_are_in_the_order_of_the_file(folder):
    attacks = {"blend": "Blend", "badnets": "BadNets"}
    folder.write(folder.TABLE | {"attacks": attacks, "rows": folder.TABLE["rows"][::-1]})
    lines = tables.markdown(Table.read(folder.table)).splitlines()[2:]
    first = [line.split(" | ")[:2] for line in lines]
    assert first == [["| Blend", "CBD, fast"], ["| BadNets", "CBD, fast"], ["| BadNets", "victim"]]


def test_the_time_of_a_table_is_told(folder):
    folder.add("cbd/badnets-s1", folder.record(84.0) | {"cost": {"train_seconds": 6900.0}})
    text = tables.page(Table.read(folder.table))
    assert "\nAll these trainings took 2.0 hours." in text  # 3 times 60 s more


def test_benchmarks_have_a_section(folder):
    (folder.path / "demo.json").write_text("{}")  # no benchmark
    fast = {"what": "training", "width": 16, "batch_size": 64, "precision": "32-true"}
    fast |= {"threads": 2, "share_of_bare_median": 0.984}
    (folder.path / "speed.json").write_text(json.dumps(fast))
    assert tables.summary(Results.read(folder.path)).endswith(
        "|---|---|---|---|---|---|\n| training | 16 | 64 | 32-true | 2 | 0.98 |\n"
    )


@pytest.fixture
def judged(folder):
    """A third row that flagged samples, also of a set without poison."""
    found = folder.record(70.0) | {"identification": {"tpr": 99.5, "fpr": 12.0, "auroc": 98.25}}
    clean = folder.record(71.0) | {"identification": {"tpr": None, "fpr": 3.0, "auroc": None}}
    clean["metrics"].pop("asr")
    folder.add("sifted/badnets-s0", found)
    folder.add("sifted/none-s0", clean)
    columns = ["labels", "seeds", "acc", "asr", "pa", "tpr", "fpr", "auroc", "seconds"]
    rows = [*folder.TABLE["rows"], {"id": "sifted", "name": "sifted"}]
    attacks = folder.TABLE["attacks"] | {"none": "none"}
    folder.write(folder.TABLE | {"columns": columns, "rows": rows, "attacks": attacks})
    return folder


def test_what_was_found_has_columns_of_its_own(judged):
    text = tables.markdown(Table.read(judged.table))
    assert "| ACC | ASR | PA | TPR | FPR | AUROC | seconds |" in text
    assert "| BadNets | sifted | none | 1 | 70.0 | 10.0 | 70.0 | 99.5 | 12.0 | 98.2 | 60 |" in text
    assert "| none | sifted | none | 1 | 71.0 |  | 70.0 |  | 3.0 |  | 60 |" in text
    assert "| BadNets | victim | train | 1 | 90.0 | 10.0 | 70.0 |  |  |  | 60 |" in text


def test_the_numbers_as_csv(judged):
    lines = list(csv.DictReader(io.StringIO(tables.comma_separated(Table.read(judged.table)))))
    assert [line["row"] for line in lines] == ["victim", "cbd", "sifted", "cbd", "sifted"]
    cbd = lines[1]
    assert (cbd["attack"], cbd["method"], cbd["labels"]) == ("badnets", "CBD, fast", "none")
    assert (cbd["seeds"], cbd["acc_mean"], cbd["acc_std"]) == ("2", "82.0000", "2.8284")
    assert cbd["train_seconds"] == "60.00"
    assert (lines[-1]["asr_mean"], lines[-1]["acc_std"], lines[-1]["fpr_mean"]) == (
        "",
        "",
        "3.0000",
    )


def test_courses_of_training_stand_below_their_table(folder):
    (folder.table / "cbd" / "badnets-s0.csv").write_text(
        "epoch,step,train/loss,val/probe_acc,val/probe_asr\n"
        "0,9,5.0,,\n0,10,,40.25,\n4,50,,52.0,11.04\n"
    )
    (folder.table / "cbd" / "blend-s0.csv").write_text("epoch,step,val/knn_acc\n4,50,33.3\n")
    table = Table.read(folder.table)
    assert tables.courses(table) == (
        "| attack | method | epoch | probe acc | probe asr | knn acc |\n"
        "|---|---|---|---|---|---|\n"
        "| BadNets | CBD, fast | 1 | 40.2 |  |  |\n"
        "| BadNets | CBD, fast | 5 | 52.0 | 11.0 |  |\n"
        "| Blend | CBD, fast | 5 |  |  | 33.3 |\n"
    )
    assert "| BadNets | CBD, fast | 5 | 52.0 |" in tables.page(table)


def test_texts_and_notes_stand_around_the_table(folder):
    rows = [folder.TABLE["rows"][0], folder.TABLE["rows"][1] | {"note": "A halt is counted."}]
    folder.write(folder.TABLE | {"rows": rows, "discussion": "## Why\n\nSo.\n"})
    text = tables.page(Table.read(folder.table))
    places = [text.index(part) for part in ("# A table", "What was done.", "| attack |", "## Why")]
    assert places == sorted(places)
    assert "\n- **CBD, fast**: A halt is counted.\n" in text


def test_facts_beside_the_records(folder):
    facts = {
        "published": {"badnets": "93 / 100", "badnets/cbd": "88 / 1"},
        "why": {"badnets": "short", "badnets/cbd": ""},
    }
    folder.write(
        folder.TABLE | {"columns": [*folder.TABLE["columns"], "published", "why"], "facts": facts}
    )
    text = tables.page(Table.read(folder.table))
    assert "| 60 | 88 / 1 |  |\n" in text
    assert "| PA | seconds | published | why |\n|---|" in text
    assert "| BadNets | victim | train | 1 | 90.0 | 10.0 | 70.0 | 60 | 93 / 100 | short |" in text
    assert "| Blend | CBD, fast | none | 1 | 50.0 | 10.0 | 70.0 | 60 |  |  |" in text


def test_chosen_rows_stand_side_by_side(folder):
    text = tables.summary(Results.read(folder.path))
    assert "## A table\n\nWhat it shows.\n[All rows](table/README.md).\n" in text
    assert "| seeds | BadNets ACC | BadNets ASR | Blend ACC | Blend ASR |" in text
    assert "| CBD, fast | none | 1 to 2 | 82.0 ± 2.8 | 10.0 ± 0.0 | 50.0 | 10.0 |" in text
    assert "| victim | train | 1 | 90.0 | 10.0 |  |  |" in text
    assert text.index("CBD, fast") < text.index("victim")
    assert "\n| [A table](table/README.md) | 2 | 2 | 0.1 |\n" in text


def test_one_seed_has_the_interval_of_its_count(folder, record):
    counted = record(50.0)
    counted["metrics"] |= {"n_clean": 100, "n_triggered": 90}
    folder.add("cbd/blend-s0", counted)
    measured = record(50.0) | {"intervals": {"asr": [1.26, 2.0]}}
    folder.add("victim/badnets-s0", measured)
    text = tables.markdown(Table.read(folder.table))
    assert "| Blend | CBD, fast | none | 1 | 50.0 (40.4 to 59.6) | 10.0 (5.4 to 17.9) |" in text
    assert "| BadNets | victim | none | 1 | 50.0 | 10.0 (1.3 to 2.0) | 70.0 |" in text
    assert "| BadNets | CBD, fast | none | 2 | 82.0 ± 2.8 | 10.0 ± 0.0 |" in text


def test_pages_are_written_and_checked(folder, capsys):
    words = [str(folder.path)]
    with pytest.raises(SystemExit, match=r"front\.md"):
        tables.main([*words, "--check"])
    tables.main(words)
    tables.main([*words, "--check"])
    text = folder.readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "What it shows." in text
    assert "82.0" in text
    written = {path.name for path in folder.table.iterdir() if path.is_file()}
    assert written == {"table.yaml", "README.md", "table.csv"}
    folder.add("cbd/badnets-s1", folder.record(90.0))
    with pytest.raises(SystemExit) as stale:
        tables.main([*words, "--check"])
    message = str(stale.value)
    assert all(str(folder.path / name) in message for name in ("README.md", "table/README.md"))
    assert "85.0" not in (folder.table / "README.md").read_text()  # a check writes nothing


@pytest.mark.parametrize("text", ["nothing", "<!-- results -->\n<!-- results -->\n"])
def test_a_page_without_its_markers_is_refused(folder, text, capsys):
    folder.readme.write_text(text)
    with pytest.raises(SystemExit) as refused:
        tables.main([str(folder.path)])
    assert refused.value.code == 2
    assert "<!-- results --> must be there once." in capsys.readouterr().err


def test_wrong_use_is_one_message_and_exit_status_2(folder, begin):
    folder.choose(pages={"front.md": folder.CHOICE | {"rows": ["cbd", "bcu"]}})
    process = begin("-m", "bdclean.reporting.tables", folder.path)
    said, told = process.communicate()
    assert process.returncode == 2
    file = folder.path / "results.yaml"
    assert told == f"{file}: unknown row 'bcu'; known: victim, cbd.\n"
    assert said == ""


def test_the_pages_of_this_repository_are_what_their_records_give():
    tables.main([str(ROOT / "docs/results"), "--check"])


def test_the_front_page_shows_at_most_eight_rows():
    results = Results.read(ROOT / "docs/results")
    pages = {page.resolve(): chosen for page, chosen in results.pages.items()}
    assert len(pages[ROOT / "README.md"].rows) <= 8


def test_names_of_files_are_plain():
    for path in (ROOT / "docs/results").rglob("*"):
        assert re.fullmatch(r"[a-z0-9_]+(-s\d+)?(\.[a-z]+)?|README\.md", path.name), path
