"""`metrics.csv` begins with the first metrics, and no other file is written."""

from pathlib import Path

import pytest

from bdclean.callbacks import MetricsLog
from bdclean.errors import FileError
from bdclean.runs import RunFolder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_touched_before_there_is_something_to_log(tmp_path):
    run = RunFolder(tmp_path / "run")
    log = MetricsLog(run)
    log.log_hyperparams({"a": 1})
    log.save()
    log.finalize("failed")
    assert not run.path.exists()
    log.log_metrics({"loss": 1.0}, 0)
    log.finalize("success")
    assert names(run.path) == ["metrics.csv"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_metrics_of_an_earlier_start_are_kept(tmp_path):
    run = RunFolder(tmp_path)
    for loss in (1.0, 2.0):
        log = MetricsLog(run)
        assert [path.name for path in run.logs()][-1:] in ([], ["metrics.csv"])
        log.log_metrics({"loss": loss}, 0)
        log.save()
        log.log_metrics({"other": loss}, 1)
        log.finalize("success")
    assert names(tmp_path) == ["metrics.1.csv", "metrics.csv"]
    assert "1.0" in (tmp_path / "metrics.1.csv").read_text()
    assert run.metrics.read_text().splitlines() == ["loss,other,step", "2.0,,0", ",2.0,1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_told(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics.symlink_to("/dev/full")
    log = MetricsLog(run)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        log.log_metrics({"loss": 1.0}, 0)
    with pytest.raises(FileError, match=r"metrics\.csv cannot be written: No space left"):
        log.finalize("success")
    log.finalize("failed")  # after another error
