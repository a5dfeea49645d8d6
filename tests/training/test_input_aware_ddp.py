"""Two processes under plain `strategy=ddp` learn one trigger and one victim."""

import pytest

SCRIPT = """
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import distributed
from bdclean.attacks import InputAware
from bdclean.data import Digits, Splits
from bdclean.modules import Recipe
from bdclean.training import InputAwareTraining
from bdclean.types import ImageFacts

seed_everything(0)
data = Digits(attack=InputAware(), splits=Splits(defense=1300, probe=60))
recipe = Recipe(epochs=2, lr=0.01, schedule="constant", batch_size=10)
facts = ImageFacts(10, 32, data.mean, data.std)
module = InputAwareTraining(facts, width=4, mask_epochs=1, recipe=recipe)
Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
        reload_dataloaders_every_n_epochs=1).fit(module, data)
states = [None, None]
distributed.all_gather_object(states, module.state_dict())
assert states[0].keys() == states[1].keys()
assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
assert all(p.grad is None for p in module.parameters())
if module.trainer.is_global_zero:
    print("equal")
"""


@pytest.mark.exhaustive
@pytest.mark.ddp
def test_both_processes_end_with_the_same_networks(run_script):
    assert "equal" in run_script(SCRIPT)
