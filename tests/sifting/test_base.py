"""What the methods on labelled data sets have in common."""

import dataclasses
import json

import pytest
import torch
from grouping import make_of
from lightning.pytorch.callbacks import Callback

from bdclean.backbones import build
from bdclean.errors import ConfigError
from bdclean.functional.seeds import derive_seed
from bdclean.modules import Recipe
from bdclean.sifting import ABL, DBR, AdvrBD, SCAn
from bdclean.weights import read

# Small networks may flag the whole of a class.
pytestmark = pytest.mark.filterwarnings("ignore:More than 95% of the samples")

ONE = Recipe(epochs=1, lr=0.02, schedule="constant", batch_size=12, augmentation="none")
SMALL = {"width": 4, "recipe": ONE, "seed": 5}
METHODS = {
    "abl": (ABL, {"isolation": ONE, "unlearning": ONE, "isolated": 0.25}),
    "dbr": (DBR, {"warm": ONE, "separate": ONE, "removal": ONE, "poisoned_part": 0.1}),
    "scan": (SCAn, {"components": 4, "threshold": 0.6, "unlearn": {"epochs": 1}}),
    "scan_retrain": (SCAn, {"components": 4, "threshold": 0.6, "repair": "retrain"}),
    "advrbd": (
        AdvrBD,
        {
            "rounds": {"count": 1, "partition_rate": 0.2, "ascent_steps": 8},
            "patch": {"pgd": {"steps": 1}},
            "enhance_steps": 8,
            "finetune": ONE,
        },
    ),
}


@pytest.fixture(params=METHODS)
def module(request, facts):
    torch.manual_seed(2)
    method, arguments = METHODS[request.param]
    return make_of(method, facts, SMALL, arguments)


class Logged(Callback):
    """The losses of each stage that trains, by its name."""

    def __init__(self):
        self.stages, self.before = {}, {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.name = pl_module.plan()[pl_module._stage].name

    def on_train_epoch_end(self, trainer, pl_module):
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:6] == "train/"}
        self.stages[self.name] = losses.keys() - self.before.keys()
        self.losses = self.before = losses


def test_stages_log_their_loss_by_their_name(module, make_poisoned, make_trainer):
    logged = Logged()
    make_trainer(logged).fit(module, make_poisoned())
    assert logged.stages.keys() == {stage.name for stage in module.plan() if stage.length}
    for name, losses in logged.stages.items():
        wanted = {"train/loss" if name == "train" else f"train/{name}_loss"}
        assert losses - {"train/isolate_ce"} == wanted
    # what is logged is what goes down
    assert logged.losses.get("train/unlearn_loss", -1.0) < 0
    assert all(logged.losses.get(f"train/{k}loss", 1.0) > 0 for k in ("", "retrain_", "relearn_"))


def test_a_network_of_its_own_making_is_called_retrained(
    module, make_poisoned, make_trainer, tmp_path
):
    assert not module.protocol()["retrained"]
    make_trainer().fit(module, make_poisoned())
    assert module.protocol()["retrained"]
    module.save_artifacts(tmp_path)
    facts = [json.loads(read(path)[1]["made_by"]) for path in tmp_path.glob("*.safetensors")]
    new = {f["network"] for f in facts if f["retrained"]}
    assert new == ({"before_relabelling"} if isinstance(module, AdvrBD) else set())
    kept = {key.split("/")[0] for key in module.results if "/" in key}
    assert {f["network"] for f in facts} == kept


def test_a_run_that_is_stopped_is_not_called_retrained(module, make_poisoned, make_trainer, cut):
    trainer = make_trainer()
    trainer.fit(module, make_poisoned())
    cut(module, make_poisoned(), trainer.global_step - 1)
    assert not module.protocol()["retrained"]


def test_results_hold_for_the_same_samples_only(facts, make_poisoned, make_trainer, tmp_path):
    method, arguments = METHODS["abl"]
    module = make_of(method, facts, SMALL, arguments)
    trainer = make_trainer()
    trainer.fit(module, make_poisoned())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    def resume(data):
        make_trainer().fit(module, data, ckpt_path=tmp_path / "end.ckpt")

    resume(make_poisoned(told=False))
    for part in "images", "labels":
        data = make_poisoned(told=False)
        known = data.poisoned_set
        values = getattr(known.stored, part).clone()
        row = data.rows.train[7]
        values[row] = 255 - values[row] if part == "images" else (values[row] + 1) % 4
        stored = dataclasses.replace(known.stored, **{part: values})
        data.poisoned_set = dataclasses.replace(known, stored=stored)
        with pytest.raises(ConfigError, match="1 of the 24 training samples has another"):
            resume(data)
    data = make_poisoned()
    data.splits = dataclasses.replace(data.splits, defense=23)
    with pytest.raises(ConfigError, match="had 24 training samples, and now there are 25"):
        resume(data)


def test_new_weights_are_those_of_the_seed(module):
    purposes = {
        ABL: "abl/retrain",
        DBR: "dbr/train",
        SCAn: "scan retrain",
        AdvrBD: "advrbd retrain",
    }
    module.make_networks()
    state = torch.random.get_rng_state()
    module.start_anew()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(derive_seed(purposes[type(module)], 5))
    wanted = build(module.model.info).state_dict()
    assert all(torch.equal(value, wanted[k]) for k, value in module.model.state_dict().items())


def test_exact_logits_are_of_float32_that_is_float32(module, monkeypatch):
    def forward(self, images):
        return (images.flatten(1) @ torch.ones(3 * 4 * 4, 2), torch.backends.cudnn.allow_tf32)

    monkeypatch.setattr(type(module), "forward", forward)
    with torch.autocast("cpu", torch.bfloat16):
        logits, tf32 = module.exact_logits(torch.rand(2, 3, 4, 4))
    assert not tf32
    assert logits.dtype == torch.float32
