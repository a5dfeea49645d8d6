"""Two processes under plain `strategy=ddp` end with one model, whatever a stage trains.

All methods of the packages run with their settings of `contract.yaml`.
"""

from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
from collections import Counter
tests, folder, *cases = sys.argv[1:]
sys.path.insert(0, tests)
import torch
import yaml
from grouping import make_of, takes
from lightning.pytorch import Trainer, seed_everything
from tiny import FACTS, TinyData
from torch import distributed
from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.callbacks import ProgressLines
from bdclean.commands.methods import methods
from bdclean.types import ImageFacts

SETTINGS = yaml.safe_load(open(tests + "/contract.yaml"))
MORE = {
    "CBD, solved": {"probe": {"solver": "lbfgs"}, "reestimate_bn": True},
    "AdvrBD": {"rounds": {"ascent_steps": 9, "agreement": 0.5}, "enhance_steps": 3},
}
class Data(TinyData):
    def read_train(self):  # so many that each process has several images of every part
        return self._read(240)

known = {method.__name__: method for _, method in methods()}
seed_everything(0)
path = folder + "/suspect.safetensors"
save_model(build(ModelInfo("resnet18", 4, 8, FACTS["mean"], FACTS["std"], width=4)), path)
for case in cases:
    seed_everything(0)
    method = known[case.split(",")[0]]
    data = Data()
    if method.needs.images == "train":
        data.attack = BadNets(target=1, rate=0.25)
    given = {"facts": ImageFacts(**FACTS)}
    if takes(method, "weights"):
        given["weights"] = path
    module = make_of(method, given, SETTINGS[method.__name__], MORE.get(case, {}))
    steps = Counter()
    for name in ("ascend", "enhance") if case == "AdvrBD" else ():
        def counted(batch, name=name, step=getattr(module, name)):
            steps[name] += 1
            return step(batch)
        setattr(module, name, counted)
    bar = case in ("CBD, solved", "ABL", "SCAn")  # both read metrics on the first process alone
    Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1, logger=False,
            callbacks=[] if bar else [ProgressLines()], enable_progress_bar=bar,
            enable_checkpointing=False, limit_val_batches=0,
            reload_dataloaders_every_n_epochs=1).fit(module, data)
    state = {name: value.tolist() for name, value in module.model.state_dict().items()}
    states = [None, None]
    distributed.all_gather_object(states, state)
    assert states[0] == states[1], case
    found = {name: value.tolist() for name, value in module.results.items()}
    results = [None, None]
    distributed.all_gather_object(results, found)
    assert results[0] == results[1], case
    if module.trainer.is_global_zero:
        print(case, "is equal", dict(steps))
"""


# In one script, so that the time does not go into starting processes.
@pytest.mark.slow
@pytest.mark.ddp
def test_both_processes_end_with_the_same_model(tmp_path, run_script):
    cases = [*yaml.safe_load((TESTS / "contract.yaml").read_text()), "CBD, solved"]
    told = run_script(SCRIPT, TESTS, tmp_path, *cases)
    for case in cases:
        assert f"{case} is equal" in told
    # 2 rounds of 9 steps and a part, and 3 at the end
    assert "AdvrBD is equal {'ascend': 20, 'enhance': 3}" in told
