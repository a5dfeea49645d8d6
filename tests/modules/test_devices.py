"""The devices share each batch: two processes take the steps that one takes.

Batch norm keeps to its running statistics here, and images are not augmented, because both depend
on what a device has got. What is left is equal but for rounding.
"""

from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
tests, folder, devices = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from grouping import make_of, takes
from lightning.pytorch import Callback, Trainer, seed_everything
from tiny import FACTS, TinyData
from torch.nn.modules.batchnorm import _BatchNorm
from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.purification import BCU, CBD
from bdclean.sifting import ABL, DBR
from bdclean.training import SimCLR, Supervised
from bdclean.types import ImageFacts

PLAIN = {"batch_size": 16, "augmentation": "none"}
ONE = PLAIN | {"epochs": 1}
PGD = {"steps": 2, "random_start": False}
PART = {"isolation": ONE, "recipe": ONE, "unlearning": ONE, "isolated": 0.2, "width": 4}
CASES = {
    "Supervised": (Supervised, PLAIN | {"width": 4}),
    "SimCLR": (SimCLR, PLAIN | {"width": 4, "batch_size": 32, "warmup_epochs": 0}),
    "CBD": (CBD, {"recipe": ONE | {"epochs": 2}, "pgd": PGD, "probe": None}),
    "BCU": (BCU, {"recipe": ONE | {"epochs": 2}}),
    "ABL": (ABL, PART | {"level_of": "batch", "level": 1.4}),
    "DBR": (DBR, {"warm": ONE, "separate": ONE, "recipe": ONE, "width": 4,
                  "removal": ONE | {"batch_size": 8}}),
}

class Fixed(Callback):
    "Batch norm as in evaluation, since its statistics are those of a device."
    def on_train_batch_start(self, trainer, module, *_):
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()

class Data(TinyData):
    def read_train(self):
        return self._read(168)  # 128 samples and 40 held out

seed_everything(0)
path = f"{folder}/suspect-{devices}.safetensors"
save_model(build(ModelInfo("resnet18", 4, 8, FACTS["mean"], FACTS["std"], width=4)), path)
for name, (method, settings) in CASES.items():
    seed_everything(0)
    data = Data()
    if method.needs.images == "train":
        data.attack = BadNets(target=1, rate=0.25)
    given = {"facts": ImageFacts(**FACTS)} | ({"weights": path} if method in (CBD, BCU) else {})
    module = make_of(method, given, settings)
    trainer = Trainer(
        accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto",
        max_epochs=1 if method in (Supervised, SimCLR) else -1, logger=False, callbacks=[Fixed()],
        enable_progress_bar=False, enable_checkpointing=False, limit_val_batches=0,
        reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, data)
    if trainer.is_global_zero:
        kept = {"steps": torch.tensor(trainer.global_step)} | module.model.state_dict()
        torch.save(kept, f"{folder}/{name}-{devices}.pt")
"""
CASES = ["Supervised", "SimCLR", "CBD", "BCU", "ABL", "DBR"]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_take_the_steps_of_one(tmp_path, run_script):
    for devices in ("1", "2"):
        run_script(SCRIPT, TESTS, tmp_path, devices, devices=int(devices))
    for case in CASES:
        one, two = (torch.load(tmp_path / f"{case}-{devices}.pt") for devices in "12")
        assert one["steps"] == two["steps"] > 0, case
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4, msg=f"{case} {name}")
