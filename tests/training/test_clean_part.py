import pytest
import torch
from lightning import Trainer

from bdclean.attacks import AdaptiveBlend, BadNets, WaNet
from bdclean.data import Digits
from bdclean.errors import ConfigError
from bdclean.training import CleanPart
from bdclean.types import ImageFacts

pytestmark = pytest.mark.filterwarnings("ignore")


class Watched(CleanPart):
    def on_train_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"])
        return super().training_step(batch, batch_idx)


def fit(attack):
    data = Digits(attack=attack)
    model = Watched(ImageFacts(10, 32, data.mean, data.std), width=4)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return data, torch.cat(model.seen)


def test_it_trains_on_what_is_neither_poisoned_nor_a_cover():
    data, seen = fit(AdaptiveBlend(target=1, rate=0.05, cover_rate=0.02))
    truth = data.training_set()
    assert truth.poisoned.sum() == 70  # of 1,400
    assert truth.covers.sum() == 28
    wanted = (~(truth.poisoned | truth.covers)).nonzero().flatten()
    assert torch.equal(seen.sort().values, wanted)


@pytest.mark.parametrize("attack", [None, WaNet(target=1, mode="dynamic")])
def test_a_data_set_whose_truth_is_unknown_is_refused(attack):
    with pytest.raises(ConfigError, match="poisons fixed samples"):
        fit(attack)


def test_a_set_that_is_poisoned_throughout_is_refused():
    with pytest.raises(ConfigError, match="no sample is clean"):
        fit(BadNets(target=1, rate=1.0))
