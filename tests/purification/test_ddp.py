"""Two processes under plain `strategy=ddp` end with one model, whatever a stage trains."""

import pytest

SCRIPT = """
import sys
from collections import Counter
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import distributed
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.callbacks import ProgressLines
from bdclean.data import Digits, Splits
from bdclean.purification import ABL, BCU, CBD, DBR, AdvrBD, Recipe, SCAn

seed_everything(0)
data = Digits(splits=Splits(defense=128, probe=100))
facts = {"num_classes": 10, "input_size": 32, "mean": data.mean, "std": data.std}
path = sys.argv[1] + "/suspect.safetensors"
save_model(build(ModelInfo("resnet18", 10, 32, data.mean, data.std, width=4)), path)
small = {"weights": path, "epochs": 1, "batch_size": 32}
one = Recipe(epochs=1, schedule="constant")
make = {
    "sgd": lambda: CBD(**facts, **small, pgd_steps=1, probe_epochs=1),
    "lbfgs": lambda: CBD(**facts, **small, pgd_steps=1, probe="lbfgs", reestimate_bn=True),
    "bcu": lambda: BCU(**facts, **small),
    "abl": lambda: ABL(**facts, width=4, isolation=one, recipe=one, unlearning=one),
    "dbr": lambda: DBR(**facts, width=4, warm=one, separate=one, recipe=one, removal=one),
    "scan": lambda: SCAn(**facts, width=4, recipe=Recipe(epochs=1), components=8, threshold=0.5),
    "advrbd": lambda: AdvrBD(**facts, width=4, recipe=Recipe(epochs=1), rounds=2, rounds_of_all=1,
                             pgd_steps=1, partition_rate=0.1, ascent_steps=9, enhance_steps=3,
                             agreement=0.9, confidence=0.2, finetune=one),
}
for case in sys.argv[2:]:
    seed_everything(0)
    module = make[case]()
    steps = Counter()
    for stage in ("unlearn", "enhance") if case == "advrbd" else ():
        def counted(batch, stage=stage, step=getattr(module, stage + "_step")):
            steps[stage] += 1
            return step(batch)
        setattr(module, stage + "_step", counted)
    bar = case in ("lbfgs", "abl", "scan")  # both read metrics on the first process alone
    Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1, logger=False,
            callbacks=[] if bar else [ProgressLines()], enable_progress_bar=bar,
            enable_checkpointing=False, limit_val_batches=0,
            reload_dataloaders_every_n_epochs=1).fit(module, data)
    state = {name: value.tolist() for name, value in module.model.state_dict().items()}
    states = [None, None]
    distributed.all_gather_object(states, state)
    assert states[0] == states[1], case
    found = {name: value.tolist() for name, value in getattr(module, "results", {}).items()}
    results = [None, None]
    distributed.all_gather_object(results, found)
    assert results[0] == results[1], case
    if module.trainer.is_global_zero:
        print(case, "is equal", dict(steps))
"""


# Two groups, so that most of the time does not go into starting processes.
@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("cases", [("sgd", "lbfgs", "bcu"), ("abl", "dbr", "scan", "advrbd")])
def test_both_processes_end_with_the_same_model(cases, tmp_path, run_script):
    told = run_script(SCRIPT, tmp_path, *cases)
    for case in cases:
        assert f"{case} is equal" in told
    if "advrbd" in cases:  # 2 rounds of 9 steps and a part, and 3 at the end
        assert "{'unlearn': 20, 'enhance': 3}" in told
