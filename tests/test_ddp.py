"""Two CPU processes under `strategy=ddp`: the same plan, and metrics equal to the last count."""

import json
from pathlib import Path

import pytest

from bdclean.locks import NAME

CONFIGS = Path(__file__).parents[1] / "configs"


def stack(*names):
    return [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]


DATA = stack("data/digits", "attack/badnets/cbd", "train/supervised/fast")


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path, run_python, begin):
    run = tmp_path / "run"
    small = ["--model.width", "4", "--trainer.max_epochs", "1", "--model.batch_size", "64"]
    run_python("-m", "bdclean", "fit", *stack("trainer/ddp_cpu"), *DATA, *small, "--run", str(run))
    two = json.loads((run / "result.json").read_text())
    assert two["cost"]["num_devices"] == 2
    assert not (run / NAME).exists()  # one of them had it, and did not refuse the other

    config, checkpoint = str(run / "config.yaml"), str(run / "checkpoints" / "last.ckpt")
    single = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    process = begin("-m", "bdclean", "test", "-c", config, "--ckpt_path", checkpoint, *single)
    _, told = process.communicate()
    assert process.returncode == 0, told
    one = json.loads((run / "test.json").read_text())
    assert one["cost"]["num_devices"] == 1
    # 397 and 361 are odd: repeated or dropped rows would show
    assert one["metrics"] == two["metrics"]
    assert one["metrics"]["n_clean"] == 397
    assert one["data"]["plan_hash"] == two["data"]["plan_hash"]


PLANS = """
import sys
from lightning.pytorch import Trainer
from torch import distributed
from bdclean.attacks import BadNets
from bdclean.data import Digits, Splits
from bdclean.training import Supervised
from bdclean.types import ImageFacts

class Compare(Supervised):
    def on_train_start(self):
        plans = [None, None]
        data = self.trainer.datamodule
        mine = (data.plan.hash, data.rows.hash)
        distributed.all_gather_object(plans, mine)
        assert plans[0] == plans[1], plans
        first = next(iter(data.train_dataloader()))
        orders = [None, None]
        distributed.all_gather_object(orders, first["index"].tolist())
        assert not set(orders[0]) & set(orders[1]), "ranks read the same rows"
        if self.trainer.is_global_zero:
            print("plans equal", plans[0][0])

data = Digits(attack=BadNets(target=6, rate=0.06), splits=Splits(defense=300, probe=100))
module = Compare(ImageFacts(10, 32, data.mean, data.std), width=4)
Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False).fit(module, datamodule=data)
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_every_rank_makes_the_same_plan(run_script):
    assert "plans equal" in run_script(PLANS)
