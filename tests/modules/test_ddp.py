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
from bdclean.functional.consistency import PatchScore
from bdclean.functional.pgd import PGD
from bdclean.modules import Probe, Recipe
from bdclean.purification import BCU, CBD
from bdclean.sifting import ABL, DBR, AdvrBD, Rounds, SCAn
from bdclean.types import ImageFacts

seed_everything(0)
data = Digits(splits=Splits(defense=128, probe=100))
facts = ImageFacts(10, 32, data.mean, data.std)
path = sys.argv[1] + "/suspect.safetensors"
save_model(build(ModelInfo("resnet18", 10, 32, data.mean, data.std, width=4)), path)
one = Recipe(epochs=1, schedule="constant")
views = Recipe(epochs=1, lr=0.02, schedule="constant", batch_size=32, augmentation="simclr")
cbd = {"weights": path, "recipe": views, "pgd": PGD(8.0, 1)}
make = {
    "sgd": lambda: CBD(facts, **cbd, probe=Probe(recipe=Recipe(epochs=1, lr=0.01))),
    "lbfgs": lambda: CBD(facts, **cbd, probe=Probe("lbfgs"), reestimate_bn=True),
    "bcu": lambda: BCU(facts, path, recipe=Recipe(epochs=1, lr=0.01, batch_size=32)),
    "abl": lambda: ABL(facts, width=4, isolation=one, recipe=one, unlearning=one),
    "dbr": lambda: DBR(facts, width=4, warm=one, separate=one, recipe=one, removal=one),
    "scan": lambda: SCAn(facts, width=4, recipe=Recipe(epochs=1), components=8, threshold=0.5),
    "advrbd": lambda: AdvrBD(
        facts, width=4, recipe=Recipe(epochs=1), patch=PatchScore(pgd=PGD(8.0, 1, 0.25)),
        rounds=Rounds(count=2, of_all=1, partition_rate=0.1, ascent_steps=9, agreement=0.9),
        enhance_steps=3, confidence=0.2, finetune=one,
    ),
}
for case in sys.argv[2:]:
    seed_everything(0)
    module = make[case]()
    steps = Counter()
    for name in ("ascend", "enhance") if case == "advrbd" else ():
        def counted(batch, name=name, step=getattr(module, name)):
            steps[name] += 1
            return step(batch)
        setattr(module, name, counted)
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
        assert "{'ascend': 20, 'enhance': 3}" in told
