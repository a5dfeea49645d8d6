"""Where the supervised module takes its network from."""

import pytest
import torch
from lightning import Trainer

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.data import Digits, Splits
from bdclean.errors import ConfigError
from bdclean.training import Supervised

FACTS = {"num_classes": 3, "input_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.fixture
def narrow(tmp_path):
    model = build(ModelInfo("resnet18", 3, 16, FACTS["mean"], FACTS["std"], width=4))
    save_model(model, tmp_path / "narrow.safetensors")
    return model, str(tmp_path / "narrow.safetensors")


def test_a_new_network_is_the_standard_one():
    info = Supervised(**FACTS).model.info
    assert (info.arch, info.width, info.stem) == ("resnet18", 64, "cifar")


def test_weights_say_what_network_they_are_for(narrow):
    model, weights = narrow
    module = Supervised(**FACTS, weights=weights)
    assert module.model.info == model.info
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_width_than_that_of_the_weights_is_refused(narrow):
    with pytest.raises(ConfigError, match=r"width=64.*was made with width=4\. Leave width out"):
        Supervised(**FACTS, weights=narrow[1], width=64)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "multistep", "constant"])
def test_a_resumed_fit_keeps_its_length_unless_its_rate_is_constant(schedule, tmp_path):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet |= {"limit_train_batches": 2, "limit_val_batches": 0, "enable_checkpointing": False}

    def fit(epochs, path=None):
        data = Digits(splits=Splits(defense=0, probe=0))
        module = Supervised(10, 32, data.mean, data.std, width=4, schedule=schedule)
        trainer = Trainer(max_epochs=epochs, **quiet)
        trainer.fit(module, data, ckpt_path=path)
        return trainer

    fit(1).save_checkpoint(tmp_path / "x.ckpt")
    if schedule == "constant":
        assert fit(2, tmp_path / "x.ckpt").global_step == 4
        return
    with pytest.raises(ConfigError, match="schedule over 2 steps, and this one has 4"):
        fit(2, tmp_path / "x.ckpt")


def test_weights_for_other_classes_get_a_new_head(narrow):
    module = Supervised(**(FACTS | {"num_classes": 5}), weights=narrow[1])
    assert module.model(torch.rand(2, 3, 16, 16)).shape == (2, 5)
