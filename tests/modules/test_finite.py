"""A training that diverges, and a model of NaN, are never measured or kept."""

import pytest
import torch
from grouping import make_of
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdclean.backbones import load_model
from bdclean.callbacks import RunRecord
from bdclean.errors import DivergedError, WeightsError
from bdclean.modules import Recipe
from bdclean.purification import BCU, CBD
from bdclean.sifting import ABL
from bdclean.training import LinearProbe, SimCLR, Supervised

WILD = {"lr": 1e18, "batch_size": 8, "epochs": 3, "augmentation": "none", "schedule": "constant"}


def wild(parameters):
    return torch.optim.SGD(parameters, lr=1e18)


CASES = {
    "Supervised": (Supervised, {"width": 4, "batch_size": 8, "optimizer": wild}),
    "SimCLR": (SimCLR, {"width": 4, "batch_size": 8, "optimizer": wild, "warmup_epochs": 0}),
    "BCU": (BCU, {"recipe": WILD}),
    "CBD": (CBD, {"recipe": WILD, "pgd": {"steps": 1}, "probe": None}),
    "LinearProbe": (LinearProbe, {"probe": {"recipe": WILD}}),
    "ABL": (ABL, {"width": 4, "isolation": WILD, "isolated": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_diverged_training_ends_and_leaves_no_product(
    name, facts, suspect, make_data, make_poisoned, make_trainer, tmp_path
):
    method, settings = CASES[name]
    given = facts | ({"weights": suspect} if method in (BCU, CBD, LinearProbe) else {})
    module = make_of(method, given, settings)
    kept = ModelCheckpoint(tmp_path / "kept", filename="last")
    epochs = 3 if method in (Supervised, SimCLR) else -1
    trainer = make_trainer(kept, RunRecord(str(tmp_path / "run")), max_epochs=epochs)
    with pytest.raises(DivergedError, match=r"has diverged: the (loss|weights).*lower the learn"):
        trainer.fit(module, make_poisoned() if method.needs.images == "train" else make_data())
    assert not (tmp_path / "run").exists()
    for file in (tmp_path / "kept").glob("*.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


class Spoil(Callback):
    """Puts NaN into one weight, after a step that was good."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                module.model.head.weight[0, 0] = torch.nan


def test_the_last_good_checkpoint_stays_and_is_named(facts, make_data, make_trainer, tmp_path):
    module = Supervised(**facts, width=4, batch_size=8)
    kept = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    trainer = make_trainer(kept, Spoil(6), max_epochs=3)  # the last step of the second epoch
    where = r"weights model\.head\.weight are not finite after step 6\..*kept/last\.ckpt\.$"
    with pytest.raises(DivergedError, match=where):
        trainer.fit(module, make_data())
    checkpoint = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["state_dict"]["model.head.weight"].isfinite().all()


def test_a_good_training_is_not_told_of(facts, make_data, make_trainer):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Supervised(**facts, width=4, batch_size=8), make_data())
    assert trainer.state.finished


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["backbone.conv1.weight", "backbone.bn1.running_var", "head.bias"])
def test_a_weights_file_with_odd_numbers_is_refused(key, value, suspect, tmp_path):
    state = load_file(suspect)
    state[key].view(-1)[-1] = value
    with safe_open(suspect, "pt") as file:
        metadata = file.metadata()
    save_file(state, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(WeightsError, match=rf"odd\.safetensors: {key} holds .*not finite"):
        load_model(tmp_path / "odd.safetensors")


def test_answers_that_are_no_numbers_are_not_counted(facts, suspect, make_data, make_trainer):
    module = BCU(**facts, weights=suspect, recipe=Recipe(epochs=1, batch_size=8))
    module.trainer = trainer = make_trainer()
    module.setup("test")
    module.model.head.bias.data[0] = torch.nan
    with pytest.raises(DivergedError, match="answers test images with numbers that are not finite"):
        trainer.test(module, make_data(), verbose=False)
