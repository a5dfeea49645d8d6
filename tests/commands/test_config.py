"""`bdclean config` lists, prints and copies what `-c NAME` finds."""

import subprocess
import sys
from pathlib import Path

import pytest

from bdclean.commands.config import run_config
from bdclean.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
CBD = CONFIGS / "purify/cbd.yaml"


def test_a_line_says_what_a_config_is(capsys):
    run_config(["ls", "measure"])
    assert capsys.readouterr().out == (
        "measure/knn           Nearest neighbours on frozen features (Wu et al., CVPR 2018).\n"
        "measure/linear_probe  A linear classifier on the frozen features of any backbone.\n"
    )


def test_all_of_them_are_listed(capsys):
    run_config(["ls"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(f"{CONFIGS / name}.yaml" for name in listed) == sorted(
        map(str, CONFIGS.rglob("*.yaml"))
    )


def test_a_word_that_is_no_folder_is_looked_for(capsys):
    run_config(["ls", "SIG"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(listed) > 1
    assert all(name.startswith("attack/sig") for name in listed)


def test_a_copy_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match=r"it cannot be written \(No space left on device\)\.$"):
        run_config(["cp", "purify/cbd", str(tmp_path / "x.yaml")])
    assert list(tmp_path.iterdir()) == []


def test_it_is_printed_as_it_is(capsys):
    run_config(["cat", "purify/cbd"])
    assert capsys.readouterr().out == CBD.read_text()


@pytest.mark.parametrize(
    ("dest", "file"), [("mine.yaml", "mine.yaml"), ("folder", "folder/cbd.yaml")]
)
def test_a_copy_goes_into_a_new_file_or_a_folder(tmp_path, capsys, dest, file):
    (tmp_path / "folder").mkdir()
    run_config(["cp", "purify/cbd", str(tmp_path / dest)])
    assert (tmp_path / file).read_bytes() == CBD.read_bytes()
    assert capsys.readouterr().out == f"Written to {tmp_path / file}.\n"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "cbd.yaml").write_text("mine")
    for dest in (tmp_path, tmp_path / "cbd.yaml"):
        with pytest.raises(ConfigError, match=r"cbd\.yaml: the file exists; name a new one\."):
            run_config(["cp", "purify/cbd", str(dest)])
    assert (tmp_path / "cbd.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "atack"], "KIND atack: there are no such configs. Kinds are arch, attack, bound, "),
        (["cat", "purify/cdb"], "NAME purify/cdb: there is no such file and no config of that"),
        (["cat", "attack/tact"], "Choose attack/tact/advrbd or attack/tact/toolbox."),
        (["cp", "purify/cdb", "x.yaml"], "NAME purify/cdb"),
        (["cp", "purify/cbd", "no/x.yaml"], "DEST no/x.yaml: it cannot be written (No such file"),
        (["cp", "purify/cbd", "no/x.yaml"], "file or directory). Make the folder no first."),
        (["cp"], "NAME is missing."),
        (["cp", "purify/cbd"], "DEST is missing."),
        (["cat"], "NAME is missing."),
    ],
)
def test_wrong_words_are_told(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as told:
        run_config(words)
    assert said in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_torch():
    code = "import sys, bdclean.commands.config, bdclean.shipped; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
