"""The two steps of the input-aware attack through the command line, on the digits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdclean.attacks import Trigger
from bdclean.attacks.input_aware import InputAwareTrigger
from bdclean.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore")


def stack(*names):
    return [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]


BASE = stack("trainer/cpu", "data/digits", "attack/input_aware/official")
BASE += ["--data.splits.defense", "1300", "--data.splits.probe", "60"]  # 40 are left to train on
BASE += ["--data.eval_batch_size", "80", "--trainer.limit_test_batches", "1"]
LEARN = ["fit", *BASE, *stack("train/input_aware/fast"), "--model.width", "4"]
LEARN += ["--model.mask_epochs", "1", "--model.recipe", "{epochs: 2, batch_size: 20}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "iab"
    main([*LEARN, "--run", str(folder)])
    return folder


def metrics(folder, name="result"):
    return json.loads((folder / f"{name}.json").read_text())["metrics"]


def test_learned_trigger_gives_the_same_numbers_in_every_later_run(run, tmp_path):
    assert isinstance(Trigger.load(run / "trigger.safetensors"), InputAwareTrigger)
    record = json.loads((run / "result.json").read_text())
    assert record["data"]["dynamic"]
    assert record["protocol"]["method"] == "input_aware"
    learned = record["metrics"]
    assert (learned["n_clean"], learned["n_triggered"], learned["n_cross_acc"]) == (80, 80, 80)

    words = ["--data.attack.trigger", str(run / "trigger.safetensors"), "--run", str(tmp_path)]
    words += ["--model.weights", str(run / "model.safetensors"), "--model.width", "4"]
    main(["test", *BASE, *stack("train/supervised/fast"), *words])
    later = metrics(tmp_path, "test")
    assert {k: later[k] for k in ("acc", "asr", "pa")} == {
        k: learned[k] for k in ("acc", "asr", "pa")
    }
    assert learned["asr"] + learned["pa"] <= 100

    checkpoint = str(run / "checkpoints" / "last.ckpt")
    main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", checkpoint])
    assert metrics(run, "test") == learned


def test_resumed_run_ends_with_the_same_weights_and_trigger(run, tmp_path):
    stop = [*LEARN, "--test_after_fit", "false", "--run", str(tmp_path)]
    main([*stop, "--trainer.max_steps", "2"])  # the mask stage
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    main([*stop, "--ckpt_path", "last"])
    for name in ("model", "trigger"):
        whole, resumed = (load_file(f / f"{name}.safetensors") for f in (run, tmp_path))
        assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []


def test_frozen_set_and_refusal_without_a_trigger(run, tmp_path, capsys):
    method = [*stack("train/supervised/fast"), "--model.width", "4", "--trainer.max_epochs", "1"]
    words = ["--test_after_fit", "false", "--run", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *BASE, *method, *words])
    assert "trigger=None: it must be the trigger.safetensors" in capsys.readouterr().err
    words += ["--data.attack.trigger", str(run / "trigger.safetensors")]
    words[words.index(str(tmp_path))] = str(tmp_path / "frozen")
    main(["fit", *BASE, *method, *words])
    record = json.loads((tmp_path / "frozen" / "result.json").read_text())
    assert (record["data"]["num_poisoned"], record["data"]["num_covers"]) == (4, 4)
    assert record["data"]["attack"]["trigger"] == "trigger.safetensors"
