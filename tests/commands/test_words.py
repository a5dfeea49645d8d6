"""The words of a command before they are parsed: their order, and the config of a run."""

import pytest

from bdclean import shipped
from bdclean.commands.words import expanded, of_run


def paths(words):
    return [str(shipped.find(word, "-c")) if "/" in word else word for word in words]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (
            ["-c", "attack/sig/cbd", "-c", "data/digits"],
            ["-c", "data/digits", "-c", "attack/sig/cbd"],
        ),
        (
            ["-c", "attack/sig/cbd", "-c", "trainer/cpu", "-c", "data/digits", "--run", "x"],
            ["-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/sig/cbd", "--run", "x"],
        ),
        (
            ["-c", "attack/sig/cbd", "--data", "Digits", "--run", "x"],
            ["--data", "Digits", "-c", "attack/sig/cbd", "--run", "x"],
        ),
        (["-c", "data/digits", "-c", "attack/sig/cbd"], None),
        (["-c", "attack/sig/cbd", "-c", "trainer/cpu"], None),
        (["-c", "data/digits", "-c", "attack/sig/cbd", "-c", "data/cifar10"], None),
        (["--run", "x", "-c"], None),
    ],
)
def test_the_class_of_the_data_comes_before_its_arguments(given, read):
    assert expanded(given) == paths(given if read is None else read)


def test_a_method_comes_before_its_arguments_too(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {init_args: {temperature: 1.0}}\n")
    words = expanded([f"--config={mine}", "-c", "purify/cbd"])
    assert words == [*paths(["-c", "purify/cbd"]), f"--config={mine}"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()


LAST = ["--ckpt_path", "last"]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        (["-c", "run/config.yaml"], ["--run", "run"], LAST),
        (["-c", "run/config.yaml"], ["--run=run"], LAST),
        (["-c", "run/config.yaml"], ["--run", "run", "--model.weights", "x"], []),
        (["-c", "run/config.yaml"], ["--run", "run", "--ckpt-path", "x"], []),
        ([], ["--run", "run", "-c", "data/digits"], []),
        ([], ["--run", "other"], []),
        ([], ["--run"], []),
        ([], [], []),
    ],
)
def test_a_run_alone_brings_its_config_and_checkpoint(before, words, after):
    assert of_run(words) == [*before, *words, *after]
