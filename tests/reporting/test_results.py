"""Mistakes in the folder of results: each is one message that names the file."""

import pytest

from bdclean.errors import DataError
from bdclean.reporting import Results, Table

VICTIM = {"id": "victim", "name": "victim"}


def test_a_wrongly_named_record_is_refused(folder):
    folder.add("cbd/nameless", {})
    with pytest.raises(DataError, match="ATTACK-sSEED"):
        Table.read(folder.table)


def test_a_wrong_record_is_refused(folder):
    file = folder.add("cbd/badnets-s0", {"metrics": {}})
    with pytest.raises(DataError, match="it lacks protocol, cost") as refused:
        Table.read(folder.table)
    assert str(file) in str(refused.value)


def test_a_record_of_another_seed_is_refused(folder):
    folder.add("cbd/badnets-s1", folder.record(84.0) | {"seed": 2})
    with pytest.raises(DataError, match=r"badnets-s1.json: the seed in the record is 2\."):
        Table.read(folder.table)


def test_a_row_without_records_is_refused(folder):
    rows = [*folder.TABLE["rows"], {"id": "bcu", "name": "BCU"}]
    folder.write(folder.TABLE | {"rows": rows})
    with pytest.raises(DataError, match="row bcu has no records"):
        Table.read(folder.table)


def test_a_folder_that_is_no_row_is_refused(folder):
    folder.write(folder.TABLE | {"rows": [VICTIM], "attacks": {"badnets": "BadNets"}})
    with pytest.raises(DataError, match="unknown row 'cbd'; known: victim"):
        Table.read(folder.table)


FACTS = {"published": {"badnets": "1"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "A"}, "unknown key 'titel'; known: title,"),
        ({"title": 3}, "title must be a text, not 3"),
        ({"rows": ["victim"]}, "'victim' must be a mapping, with id, name, note"),
        ({"rows": [{"id": "victim"}]}, "the key name is missing"),
        ({"rows": [VICTIM, VICTIM, {"id": "cbd", "name": "CBD"}]}, "row victim is there twice"),
        ({"attacks": {"badnets": "BadNets"}}, "unknown attack 'blend'; known: badnets"),
        ({"attacks": {"badnets": "B", "blend": "B", "sig": "SIG"}}, "attack sig has no records"),
        ({"columns": ["acc", "tpr"]}, "unknown column 'tpr'; known: labels, seeds, seconds, acc"),
        ({"facts": FACTS}, "unknown column 'published'"),
        ({"facts": {"acc": {"sig": "1"}}}, "unknown attack 'sig'"),
        ({"facts": {"acc": {"badnets/bcu": "1"}}}, "unknown row 'bcu'"),
        ({"facts": {"acc": {"badnets": 1}}}, "badnets must be a text, not 1"),
    ],
)
def test_mistakes_in_a_table(folder, change, message):
    folder.write(folder.TABLE | change)
    with pytest.raises(DataError, match=message) as refused:
        Table.read(folder.table)
    assert str(folder.table / "table.yaml") in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": []}, "unknown table 'table'"),
        ({"tables": ["table", "other"]}, "other/table.yaml cannot be read"),
        ({"summary": [{"table": "other"}]}, "unknown table 'other'; known: table"),
        ({"summary": [{"rows": ["bcu"]}]}, "unknown row 'bcu'; known: victim, cbd"),
        ({"summary": [{"attacks": {"SIG": "sig"}}]}, "unknown attack 'sig'"),
        ({"summary": [{"values": ["tpr"]}]}, "unknown value 'tpr'; known: acc, asr, pa"),
        ({"pages": {"front.md": {}}}, "the key table is missing"),
    ],
)
def test_mistakes_in_the_choice(folder, change, message):
    if change.get("summary"):
        change = {"summary": [folder.CHOICE | change["summary"][0]]}
    folder.choose(**change)
    with pytest.raises(DataError, match=message):
        Results.read(folder.path)


def test_a_file_that_is_not_yaml_is_refused(folder):
    (folder.table / "table.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"table\.yaml is not YAML"):
        Table.read(folder.table)
    (folder.table / "table.yaml").write_text("- a")
    with pytest.raises(DataError, match="must be a mapping"):
        Table.read(folder.table)
