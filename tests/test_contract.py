"""What every staged method keeps, whatever it computes: resume, labels, checkpoints, export, DDP.

The methods are found in the packages. A new one adds its smallest settings to `contract.yaml` and
its own oracles; these tests find it by themselves.
"""

from pathlib import Path

import pytest
import torch
import yaml
from grouping import make_of, takes
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from bdclean.backbones import load_model, save_model
from bdclean.commands.methods import methods
from bdclean.errors import ConfigError
from bdclean.modules import Recipe, Stage, StagedModule
from bdclean.purification import Purifier
from bdclean.types import View

# So few samples are flagged by classes.
pytestmark = pytest.mark.filterwarnings("ignore:More than 95% of the samples of the classes")
SETTINGS = yaml.safe_load((Path(__file__).parent / "contract.yaml").read_text())
METHODS = {
    method.__name__: method
    for _, method in methods()
    if issubclass(method, StagedModule) and method.needs.labels != ("train",)
}


def test_every_method_has_its_smallest_settings():
    assert SETTINGS.keys() == METHODS.keys()


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture
def make(method, facts, suspect):
    """The method with its smallest settings."""
    weights = {"weights": suspect} if takes(method, "weights") else {}

    def make(**changes):
        torch.manual_seed(7)  # what is drawn in `setup` comes from the global generator
        return make_of(method, facts, weights, SETTINGS[method.__name__], changes)

    return make


@pytest.fixture
def data_of(method, make_data, make_poisoned):
    """Poisoned samples for what sifts them, else the defender's images."""
    return make_poisoned if method.needs.images == "train" else make_data


class Batches(Callback):
    """Notes the step of every batch, and how many steps there were at the ends of epochs."""

    def __init__(self):
        self.seen, self.ends = [], []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.global_step)

    def on_train_epoch_end(self, trainer, *_):
        self.ends.append(trainer.global_step)


def same(a, b):
    a, b = ({**module.state_dict(), **module.results} for module in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_resumes_exactly_at_every_epoch_and_within_one(
    make, data_of, make_trainer, every_epoch, cut, tmp_path
):
    whole, batches = make(), Batches()
    folder = tmp_path / "steps"
    steps = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    make_trainer(every_epoch, steps, batches).fit(whole, data_of())
    assert whole.finished
    # What is written at the last batch of an epoch does not know yet that the stage changes.
    last = [folder / f"step={step}.ckpt" for step in batches.ends]
    ends = [Path(every_epoch.dirpath) / f"epoch={n}.ckpt" for n in range(whole.total_epochs)]
    for done, path in zip(batches.ends * 2, ends + last, strict=True):
        resumed, again = make(), Batches()
        make_trainer(again, name="resumed").fit(resumed, data_of(), ckpt_path=path)
        assert same(resumed, whole), path
        assert again.seen == batches.seen[done:], path
    stopped = make()
    path = cut(stopped, data_of(), 1)
    assert not stopped.finished
    assert not stopped.details().get("finished", False)
    resumed, again = make(), Batches()
    make_trainer(again, name="cut").fit(resumed, data_of(), ckpt_path=path)
    assert same(resumed, whole)
    assert again.seen == batches.seen[1:]


def test_labels_are_seen_by_no_method_but_one_that_declares_them(
    method, make, data_of, make_data, make_trainer
):
    data, module = data_of(), make()
    make_trainer().fit(module, data)
    allowed = {method.needs.images} | ({"probe"} if module.probes else set())
    allowed |= {"probe"} if "clean" in method.needs.labels else set()
    assert {view.role for view in data.asked} <= allowed
    shows = {role for role, keys in data.keys if "label" in keys}
    may = {"train"} if "untrusted" in method.needs.labels else set()
    may |= {"probe"} if module.probes or "clean" in method.needs.labels else set()
    assert shows <= may
    if not method.needs.labels:
        # All labels changed, and no bit of the result: the probe alone may see them.
        changes = {"probe": None} if module.probes else {}
        blind, twin = make(**changes), make(**changes)
        make_trainer(name="blind").fit(blind, make_data(shuffle_labels=True))
        make_trainer(name="twin").fit(twin, make_data())
        assert same(blind, twin)


def test_a_checkpoint_is_enough_to_evaluate_and_is_read_without_unpickling(
    method, make, data_of, make_trainer, tmp_path
):
    kept = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    module = make()
    make_trainer(kept).fit(module, data_of())
    checkpoint = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    ours = [key for key in checkpoint if key.startswith("bdclean")]
    assert ours == ["bdclean"]
    assert checkpoint["bdclean"]["method"] == method.name
    loaded = method.load_from_checkpoint(tmp_path / "kept/last.ckpt")
    assert same(loaded, module)
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        wanted = module.product().eval()(images)
        assert torch.equal(loaded.product().eval()(images), wanted)
        # As a weights file of its own, and as the input of another method.
        assert torch.allclose(
            load_model(tmp_path / "kept/last.ckpt").eval()(images), wanted, atol=1e-5
        )
        save_model(module.product(), tmp_path / "model.safetensors")
        assert torch.allclose(
            load_model(tmp_path / "model.safetensors").eval()(images), wanted, atol=1e-5
        )
    results = make_trainer(name="test").test(
        make(), data_of(), ckpt_path=tmp_path / "kept/last.ckpt"
    )
    again = make_trainer(name="again").test(module, data_of())
    assert results == again
    assert "test/acc" in results[0]


def test_the_record_says_what_the_method_declares(method, make, data_of, make_trainer):
    module = make()
    make_trainer().fit(module, data_of())
    facts = module.protocol()
    assert (facts["method"], facts["labels"]) == (method.name, method.needs.labels_name)
    assert (
        facts["head"] == ("probe" if module.probes else "original")
        or method.needs.images == "probe"
    )


def test_a_trainer_fits_once_and_a_checkpoint_belongs_to_its_method(
    method, make, data_of, make_trainer, tmp_path
):
    kept = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    make_trainer(kept).fit(make(), data_of())
    trainer = make_trainer(name="twice")
    trainer.fit(make(), data_of())
    with pytest.raises(ConfigError, match=r"has trained \d+ epochs already"):
        trainer.fit(make(), data_of())
    checkpoint = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    checkpoint["bdclean"]["method"] = "another"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="was written by another"):
        make_trainer(name="other").fit(make(), data_of(), ckpt_path=tmp_path / "other.ckpt")
    del checkpoint["bdclean"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ConfigError, match="of an earlier version"):
        make_trainer(name="old").fit(make(), data_of(), ckpt_path=tmp_path / "old.ckpt")


DAMAGE = {
    "no method": lambda c: c["bdclean"].pop("method"),
    "no networks": lambda c: c["bdclean"].pop("networks"),
    "networks of another kind": lambda c: c["bdclean"].update(networks={"model": 3}),
    "no stage": lambda c: c["bdclean"].pop("stage"),
    "a stage that is none": lambda c: c["bdclean"].update(stage="x"),
    "a stage behind the last": lambda c: c["bdclean"].update(stage=99),
    "a plan that is none": lambda c: c["bdclean"].update(plan=3),
    "no results": lambda c: c["bdclean"].pop("results"),
    "no weights": lambda c: c["state_dict"].clear(),
    "other weights": lambda c: c["state_dict"].update({"model.normalize.mean": torch.ones(7)}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_message(
    damage, facts, suspect, make_data, make_trainer, tmp_path
):
    def make():
        return make_of(METHODS["BCU"], facts, {"weights": suspect}, SETTINGS["BCU"])

    kept = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    make_trainer(kept).fit(make(), make_data())
    checkpoint = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(ConfigError, match=r"^--ckpt_path \S+damaged\.ckpt: "):
        make_trainer(name="again").fit(make(), make_data(), ckpt_path=tmp_path / "damaged.ckpt")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "no stage that trains"),
        ((Stage("look"),), "no stage that trains"),
        ((Stage("fit", Recipe(epochs=1)),), "the stage fit trains, so it needs `reads`"),
        (
            (Stage("fit", epochs=1, reads=lambda: View("defense")),),
            "the stage fit trains, so it needs a recipe or an optimizer",
        ),
    ],
)
def test_a_plan_that_cannot_run_is_refused(
    stages, message, facts, suspect, make_data, make_trainer
):
    class Planned(Purifier):
        def plan(self):
            return stages

    with pytest.raises(ConfigError, match=f"^Planned: .*{message}"):
        make_trainer().fit(Planned(**facts, weights=suspect), make_data())
