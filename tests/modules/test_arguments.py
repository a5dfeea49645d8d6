"""Arguments in checkpoints: plain values there, groups of settings again when they are loaded."""

from dataclasses import asdict, is_dataclass, replace

import pytest
import torch
from grouping import make_of
from lightning import Trainer

from bdclean.attacks import BadNets, InputAware
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.commands.methods import methods
from bdclean.data import Digits, Splits
from bdclean.modules import Recipe
from bdclean.purification import BCU, CBD
from bdclean.training import KNN, InputAwareTraining, Supervised
from bdclean.types import ImageFacts

pytestmark = [
    # Digits in memory need no worker processes.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]
FACTS = ImageFacts(10, 32, Digits.mean, Digits.std)
SHORT = Recipe(epochs=2, lr=0.03, schedule="multistep", milestones=(0.25,), batch_size=20)
ARGUMENTS = {
    "CBD": {
        "recipe": {"epochs": 3, "batch_size": 20},
        "pgd": {"epsilon": 4.0, "steps": 1},
        "projection": {"dim": 16, "epochs": 2},
        "probe": {"solver": "lbfgs", "c": 0.5},
    },
    "BCU": {"recipe": SHORT, "ratios": [0.2] * 10},
    "ShortcutDistillation": {"recipe": SHORT, "patch": {"sides": (0.1, 0.3)}, "universal": None},
    "LinearProbe": {"probe": {"recipe": {"epochs": 3, "milestones": (0.5,)}}},
    "ABL": {"width": 4, "isolation": SHORT, "unlearning": SHORT},
    "DBR": {"width": 4, "separate": SHORT, "warm": SHORT},
    "SCAn": {"width": 4, "recipe": SHORT, "components": 3},
    "AdvrBD": {
        "width": 4,
        "recipe": SHORT,
        "patch": {"shape": "disc", "pgd": {"steps": 3}},
        "rounds": {"count": 2, "candidates": 3},
    },
    "Supervised": {"width": 4, "batch_size": 20, "milestones": [0.25]},
    "CleanPart": {"width": 4, "batch_size": 20},
    "AdversarialTraining": {"width": 4, "batch_size": 20, "pgd": {"steps": 1}},
    "SimCLR": {"width": 4, "batch_size": 20, "warmup_epochs": 1},
    "InputAwareTraining": {
        "width": 4,
        "mask_epochs": 1,
        "mask": {"milestones": (0.5,)},
        "recipe": {"epochs": 2, "batch_size": 20},
    },
}
# nearest neighbours have nothing to fit
METHODS = [method for _, method in methods() if method is not KNN]


@pytest.fixture
def weights(tmp_path):
    info = ModelInfo("resnet18", 10, 32, FACTS.mean, FACTS.std, width=4)
    save_model(build(info), tmp_path / "suspect.safetensors")
    return str(tmp_path / "suspect.safetensors")


def fit(module, tmp_path):
    """One step on the digits; gives the checkpoint."""
    attack = InputAware() if isinstance(module, InputAwareTraining) else BadNets(target=6)
    data = Digits(attack=attack, splits=Splits(defense=100, probe=100))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1 if hasattr(module, "plan") else 1,
        max_steps=1,
        logger=False,
        limit_train_batches=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def groups(module):
    """Settings that are groups, by attribute."""
    return {name: value for name, value in vars(module).items() if is_dataclass(value)}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_a_checkpoint_loads_without_trainer_and_without_unpickling(kind, weights, tmp_path):
    needs_file = "source" in vars(make_of(kind, {"facts": FACTS}, ARGUMENTS[kind.__name__]))
    given = {"facts": FACTS} | ({"weights": weights} if needs_file else {})
    module = make_of(kind, given, ARGUMENTS[kind.__name__])
    path = fit(module, tmp_path)
    kept = torch.load(path, weights_only=True)["hyper_parameters"]
    assert is_plain(kept)
    assert kept["facts"]["num_classes"] == 10
    again = kind.load_from_checkpoint(path, weights_only=True)
    assert type(again) is kind
    assert groups(again) == groups(module)
    kept = dict(again.hparams)  # with the defaults of forwarded arguments as well
    assert {name: kept.get(name) for name in module.hparams} == dict(module.hparams)
    states = module.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert again.protocol() == module.protocol()


def test_arguments_may_be_changed_when_a_checkpoint_is_loaded(weights, tmp_path):
    module = make_of(CBD, {"facts": FACTS, "weights": weights}, ARGUMENTS["CBD"])
    path = fit(module, tmp_path)
    again = CBD.load_from_checkpoint(path, weights_only=True, temperature=0.25)
    assert (again.temperature, again.recipe) == (0.25, module.recipe)
    recipe = replace(module.recipe, epochs=9)
    again = CBD.load_from_checkpoint(path, weights_only=True, recipe=asdict(recipe))
    assert again.recipe == recipe
    again = CBD.load_from_checkpoint(path, weights_only=True, recipe=recipe, facts=FACTS)
    assert (again.recipe, again.facts) == (recipe, FACTS)


def test_arguments_are_kept_as_they_were_given_and_not_as_they_are_later():
    ratios = [0.2] * 10
    module = BCU(FACTS, ratios=ratios)
    ratios[0] = 1.0
    assert module.hparams_initial["ratios"][0] == 0.2
    assert module.hparams["recipe"] == {
        "epochs": 100,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "nesterov": False,
        "schedule": "cosine",
        "milestones": (0.5, 0.75),
        "batch_size": 256,
        "augmentation": "weak",
    }
    assert module.hparams["facts"] == {
        "num_classes": 10,
        "input_size": 32,
        "mean": Digits.mean,
        "std": Digits.std,
    }


def test_what_no_file_can_hold_is_left_out():
    module = Supervised(FACTS, width=4)
    assert "optimizer" not in module.hparams
    assert module.hparams["width"] == 4
