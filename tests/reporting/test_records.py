"""Records and run folders as values, and what is refused."""

import json

import pytest

from bdclean.errors import DataError
from bdclean.reporting import Record, Run


def written(tmp_path, content):
    file = tmp_path / "result.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_record_without_a_schema_is_the_oldest(tmp_path, record):
    old = Record.read(written(tmp_path, record(80.0)))
    assert old.schema == 0
    new = Record.read(written(tmp_path, record(80.0) | {"schema": 1}))
    assert new.schema == 1


def test_what_a_record_says(tmp_path, record):
    content = record(80.0) | {"seed": 3}
    content["protocol"] |= {"head": "probe", "probe_labels": "clean"}
    content["identification"] = {"tpr": 90.0, "ap": None, "rounds": [{}], "further": {}}
    read = Record.read(written(tmp_path, content))
    assert (read.seed, read.train_seconds) == (3, 60.0)
    assert read.labels == "none, probe: clean"
    assert read.numbers == {"acc": 80.0, "asr": 10.0, "pa": 70.0, "tpr": 90.0, "ap": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a readable record"),
        ("[]", "is not a record of a run"),
        ("{}", "it lacks metrics, protocol, cost"),
        ({"metrics": {}, "protocol": {}}, "it lacks cost"),
        ({"schema": 99}, "schema=99: .* update bdclean"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, record, content, message):
    if "schema" in content:
        content = record(80.0) | content
    file = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as refused:
        Record.read(file)
    assert str(refused.value).startswith(str(file))


def test_a_missing_record_is_refused(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        Record.read(tmp_path / "result.json")


def test_a_run_folder(tmp_path, record):
    written(tmp_path, record(80.0))
    (tmp_path / "config.yaml").write_text("seed_everything: 3\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints").mkdir()
    run = Run.read(tmp_path)
    assert run.folder.path == tmp_path
    assert run.config == {"seed_everything": 3}
    assert run.record.numbers["acc"] == 80.0
    assert run.test is None
    assert set(run.files) == {"config.yaml", "model.safetensors", "result.json"}


def test_an_unfinished_run_has_no_record(tmp_path, record):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert Run.read(tmp_path).record is None
    (tmp_path / "test.json").write_text(json.dumps(record(70.0)))
    assert Run.read(tmp_path).test.numbers["acc"] == 70.0


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not the folder of a run"):
        Run.read(tmp_path)
