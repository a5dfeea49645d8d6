"""The words of a command before they are parsed: their order, and the config of a run."""

from pathlib import Path

import pytest
import yaml

from bdclean import shipped
from bdclean.commands.words import as_typed, expanded, of_run, spelled


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


@pytest.mark.parametrize("how", ["a file", "text"])
@pytest.mark.parametrize("key", ["model", "data"])
def test_arguments_come_after_their_class_whatever_holds_them(how, key, tmp_path):
    text = f"{key}: {{init_args: {{x: 1}}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    mine = str(tmp_path / "mine.yaml") if how == "a file" else text
    whole = "{data: {class_path: D}, model: M}"
    assert expanded(["-c", mine, "-c", whole]) == ["-c", whole, "-c", mine]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--run", "x", "-c", "purify/cbd"], ["-c", "purify/cbd", "--run", "x"]),
        (["--run=x", "-c", "purify/cbd"], ["-c", "purify/cbd", "--run=x"]),
        (
            ["--run", "x", "--model.width", "4", "-c", "purify/cbd", "--y"],
            ["--model.width", "4", "-c", "purify/cbd", "--run", "x", "--y"],
        ),
        (
            ["--run", "x", "-c", "{run: y}", "--run", "z", "-c", "{run: w}"],
            ["-c", "{run: y}", "-c", "{run: w}", "--run", "x", "--run", "z"],
        ),
        (["-c", "purify/cbd", "--run", "x"], None),
        (["--run", "x"], None),
        (["--run", "-c", "purify/cbd"], ["-c", "purify/cbd", "--run"]),
    ],
)
def test_a_run_that_is_typed_counts_wherever_it_stands(given, read):
    assert expanded(given) == paths(given if read is None else read)


def test_other_options_count_by_their_order():
    words = ["--model.width", "4", *paths(["-c", "purify/cbd"]), "--model.width", "8"]
    assert expanded(words) == words


def test_dashes_within_values_stay():
    text = "---\nrun: a-b\n"
    assert spelled(["--dry-run", "--a-b=c-d", "-c", text]) == [
        *("--dry_run", "--a_b=c-d", "-c", text),
    ]
    assert expanded(["-c", text]) == [f"--config={text}"]


VICTIM = """
seed_everything: 3
model:
  class_path: bdclean.training.Supervised
  init_args: {arch: resnet18, width: 8, gamma: 0.1, weights: null}
data:
  class_path: bdclean.data.Digits
  init_args: {splits: {defense: 200}}
trainer:
  {accelerator: cpu, devices: 1, num_nodes: 1, strategy: auto, precision: 32-true, plugins: null,
  num_sanity_val_steps: 0, deterministic: true, benchmark: false, sync_batchnorm: true,
  max_epochs: 3, max_steps: 9, callbacks: [A], limit_test_batches: 2, limit_val_batches: 2,
  logger: false, detect_anomaly: true, inference_mode: false, profiler: simple}
checkpoint: {monitor: val/acc}
test_after_fit: false
weights_only: true
ckpt_path: null
run: runs/victim
"""
OF_MACHINE = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins"),
    *("num_sanity_val_steps", "deterministic", "benchmark", "sync_batchnorm"),
)


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(VICTIM)
    return str(file)


@pytest.mark.parametrize(
    "method", [["-c", "purify/bcu"], ["--model", "BCU"], ["--model=bdclean.purification.BCU"]]
)
@pytest.mark.parametrize("how", ["a file", "text", "text that is joined"])
def test_settings_of_a_former_method_do_not_count_for_the_next_one(victim, method, how):
    config = {"a file": ["-c", victim], "text": ["-c", VICTIM]}.get(how, [f"--config={VICTIM}"])
    words = expanded([*config, *method, "--run", "x"])
    assert words[2:] == paths([*method, "--run", "x"])
    whole = yaml.safe_load(VICTIM)
    network = {"arch": "resnet18", "width": 8}
    assert yaml.safe_load(words[1]) == {
        "seed_everything": 3,
        "data": whole["data"],
        "trainer": {key: whole["trainer"][key] for key in OF_MACHINE},
        "model": {"class_path": "bdclean.training.Supervised", "init_args": network},
    }


def test_a_config_that_names_no_method_brings_all_it_says():
    words = ["-c", "{test_after_fit: false, trainer: {max_steps: 3}}", "--model", "BCU"]
    assert expanded(words) == words


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


def test_an_evaluation_is_named_as_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("run: run\n")
    for words in (
        ["--run", "run"],
        ["--run=run"],
        ["--run", "run", "--ckpt_path", "x"],
        ["--model.weights", "x", "--run", "run"],
        ["-c", "run/config.yaml", "--ckpt_path", "x"],
    ):
        assert as_typed(of_run(words)) == words
