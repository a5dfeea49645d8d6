"""The words of a command before they are parsed: their order, and the config of a run."""

import pytest
import yaml

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


VICTIM = """
seed_everything: 3
model:
  class_path: bdclean.training.Supervised
  init_args: {arch: resnet18, width: 8, gamma: 0.1, weights: null}
data:
  class_path: bdclean.data.Digits
  init_args: {splits: {defense: 200}}
trainer: {accelerator: cpu, precision: 32-true, max_epochs: 3, max_steps: 9, callbacks: [A]}
checkpoint: {monitor: val/acc}
run: runs/victim
"""


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(VICTIM)
    return str(file)


@pytest.mark.parametrize(
    "method", [["-c", "purify/bcu"], ["--model", "BCU"], ["--model=bdclean.purification.BCU"]]
)
def test_settings_of_a_former_method_do_not_count_for_the_next_one(victim, method):
    words = expanded(["-c", victim, *method, "--run", "x"])
    assert words[2:] == paths([*method, "--run", "x"])
    whole = yaml.safe_load(VICTIM)
    network = {"arch": "resnet18", "width": 8}
    assert yaml.safe_load(words[1]) == {
        "seed_everything": 3,
        "data": whole["data"],
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "model": {"class_path": "bdclean.training.Supervised", "init_args": network},
    }


@pytest.mark.parametrize("method", [["-c", "train/supervised"], ["--model", "Supervised"], []])
def test_the_same_method_goes_on_with_its_settings(victim, method):
    assert expanded(["-c", victim, *method]) == ["-c", victim, *paths(method)]


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
