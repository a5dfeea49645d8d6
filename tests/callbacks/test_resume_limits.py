"""Whatever limits the Trainer has, a run that was killed goes on as if it had not been."""

import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from forks import Send, forked
from grouping import make_of
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from places import HOOKS, Count, Everywhere, Seen

from bdclean.attacks import BadNets, InputAware
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.data.images import ImageSet
from bdclean.data.splits import Splits
from bdclean.errors import ConfigError
from bdclean.purification import BCU, CBD
from bdclean.sifting import AdvrBD
from bdclean.training import InputAwareTraining, SimCLR, Supervised
from bdclean.types import ImageFacts

SIZE, MEAN, STD = 16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)
FACTS = ImageFacts(4, SIZE, MEAN, STD)
RECIPE = {"epochs": 2, "batch_size": 5, "augmentation": "weak"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:More than 95% of the samples"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


@pytest.fixture
def suspect(tmp_path):
    torch.manual_seed(5)
    model = build(ModelInfo("resnet18", 4, SIZE, MEAN, STD, width=4))
    save_model(model, tmp_path / "suspect.safetensors")
    return str(tmp_path / "suspect.safetensors")


@pytest.fixture
def make(suspect):
    """A method by its name; each trains for some ten to twenty steps."""
    few = {"steps": 1}
    kinds = {
        "supervised": (Supervised, {"width": 4, "batch_size": 5, "schedule": "onecycle"}),
        "simclr": (SimCLR, {"width": 4, "batch_size": 5}),
        "bcu": (BCU, {"weights": suspect, "recipe": {**RECIPE, "epochs": 3}}),
        "cbd": (
            CBD,
            {
                "weights": suspect,
                "recipe": {**RECIPE, "augmentation": "simclr"},
                "pgd": few,
                "probe": {"solver": "sgd", "recipe": RECIPE},
            },
        ),
        "advrbd": (
            AdvrBD,
            {
                "width": 4,
                "recipe": {**RECIPE, "epochs": 1, "augmentation": "crop"},
                "finetune": {**RECIPE, "epochs": 1},
                "rounds": {"count": 1, "of_all": 0, "partition_rate": 0.2, "ascent_steps": 1},
                "patch": {"pgd": few},
            },
        ),
        "input_aware": (InputAwareTraining, {"width": 4, "mask_epochs": 1, "recipe": RECIPE}),
    }

    def make(method):
        torch.manual_seed(2)
        kind, settings = kinds[method]
        return make_of(kind, {"facts": FACTS}, settings)

    return make


@pytest.fixture
def data_of(make_data):
    """24 training, 20 defence, 12 probe and 8 validation images, shuffled."""

    class Data(make_data):
        input_size = SIZE

        def __init__(self, method):
            super().__init__()
            self.splits, self.validate_in_fit = Splits(defense=20, probe=12, val=8), True
            self.attack = BadNets(target=1, rate=0.25, patch_size=3)
            if method == "input_aware":
                self.attack = InputAware(target=1, rate=0.2, cover_rate=0.2)

        def _read(self, rows):
            small = super()._read(rows)
            return ImageSet(small.images.repeat(1, 1, 2, 2), small.labels)

    return Data


VALIDATED = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1}
LIMITS = {
    "none": {},
    "limit_train_batches": {"limit_train_batches": 2},
    "a share of the batches": {"limit_train_batches": 0.7},
    "max_steps within an epoch": {"max_steps": 8},
    "max_steps at the end of an epoch": {"max_steps": 10, "max_epochs": -1},
    "accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "validation after each epoch": VALIDATED,
    "validation within the epoch": {**VALIDATED, "val_check_interval": 2},
    "validation by steps": {
        **VALIDATED,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
    },
    "validation every other epoch": {**VALIDATED, "check_val_every_n_epoch": 2},
    "all": {
        **VALIDATED,
        "limit_train_batches": 3,
        "accumulate_grad_batches": 2,
        "max_steps": 5,
        "val_check_interval": 0.5,
    },
}
LENGTH = {"supervised": 3, "simclr": 3}


def state_of(module):
    results = getattr(module, "results", {})
    return {**module.state_dict(), **{f"results.{key}": value for key, value in results.items()}}


def differing(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.fixture
def fit(make, data_of, make_trainer):
    """Fits a method under limits; gives the module, the trainer and what was seen."""

    def fit(method, limits, *callbacks, path=None, name="run"):
        torch.manual_seed(0)
        seen, module = Seen(), make(method)
        saves = any(isinstance(each, Checkpoint) for each in callbacks)
        settings = {"max_epochs": LENGTH.get(method, -1), "enable_checkpointing": saves} | limits
        trainer = make_trainer(seen, *callbacks, name=name, **settings)
        trainer.fit(module, data_of(method), ckpt_path=path)
        return module, trainer, seen

    return fit


def check_place(fit, method, limits, whole, file):
    """Goes on from a file as the whole run did."""
    module, trainer, seen = whole
    resumed, again, after = fit(method, limits, path=file, name="resumed")
    done = torch.load(file, weights_only=True)["global_step"]
    if done != limits.get("max_steps"):  # such a fit has ended: it validates no more
        assert after.events == seen.events[after.before :]
    assert again.global_step == trainer.global_step
    assert differing(state_of(module), state_of(resumed)) == []


@pytest.mark.parametrize("limits", LIMITS)
def test_a_run_goes_on_from_wherever_it_was_saved(limits, fit, tmp_path):
    saves = Everywhere(tmp_path)
    whole = fit("supervised", LIMITS[limits], saves)
    assert len(saves.files) > 10
    for file in saves.files[::4]:
        check_place(fit, "supervised", LIMITS[limits], whole, file)


OF_METHODS = {
    "simclr": {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_steps": 5},
    "bcu": {**VALIDATED, "limit_train_batches": 0.8, "max_steps": 7, "val_check_interval": 2},
    "cbd": {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_steps": 7},
    "advrbd": {**VALIDATED, "limit_train_batches": 3, "max_steps": 14, "val_check_interval": 0.5},
    "input_aware": {**VALIDATED, "limit_train_batches": 4, "max_steps": 18},
}


@pytest.mark.parametrize("method", [each for each in OF_METHODS if each != "input_aware"])
def test_methods_go_on_under_limits(method, fit, tmp_path):
    saves = Everywhere(tmp_path)
    whole = fit(method, OF_METHODS[method], saves)
    for file in saves.files[1 :: max(1, len(saves.files) // 4)]:
        check_place(fit, method, OF_METHODS[method], whole, file)


@pytest.mark.exhaustive
@pytest.mark.parametrize("limited", [False, True], ids=["without limits", "with limits"])
@pytest.mark.parametrize("method", OF_METHODS)
def test_methods_go_on_from_many_places(method, limited, fit, tmp_path):
    limits, saves = OF_METHODS[method] if limited else {}, Everywhere(tmp_path)
    whole = fit(method, limits, saves)
    for file in saves.files[:: max(1, len(saves.files) // 12)]:
        check_place(fit, method, limits, whole, file)


@pytest.fixture
def check_kill(fit, tmp_path):
    """Kills a run at the `number`-th of ten moments, goes on, and compares it with the whole one.

    Which hook, signal and kind of checkpoint it is takes turns.
    """

    def check_kill(method, limits, number):
        count = Count()
        whole, trainer, _ = fit(method, limits, count, Everywhere(tmp_path))
        hook, signum = HOOKS[number % 4], (signal.SIGKILL, signal.SIGTERM)[number % 2]
        often = {"every_n_train_steps": 2} if number % 3 else {"train_time_interval": timedelta(0)}
        moment = Send(hook, 1 + number * (count.calls[hook] - 1) // 9, signum)
        folder, done = tmp_path / "kept", tmp_path / "done"
        last = folder / "last.ckpt"

        def work(*sends):
            kept = ModelCheckpoint(folder, "last", enable_version_counter=False, **often)
            path = last if last.is_file() else None
            module, trainer, _ = fit(method, limits, *sends, kept, path=path, name="killed")
            torch.save((state_of(module), trainer.global_step), done)

        status = forked(lambda: work(moment), tmp_path / "log")
        assert status == -signum or signum == signal.SIGTERM, (tmp_path / "log").read_text()
        assert not done.exists()
        assert forked(work, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        state, steps = torch.load(done, weights_only=True)
        assert steps == trainer.global_step
        assert differing(state_of(whole), state) == []

    return check_kill


@pytest.mark.parametrize("number", [2, 7])
def test_a_killed_run_goes_on(number, check_kill):
    check_kill("supervised", LIMITS["all"], number)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("limited", [False, True], ids=["without limits", "with limits"])
@pytest.mark.parametrize("method", ["supervised", *OF_METHODS])
def test_killed_at_ten_moments(method, limited, number, check_kill):
    limits = {"supervised": LIMITS["all"], **OF_METHODS}[method] if limited else {}
    check_kill(method, limits, number)


DEVICES = """
import sys
tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tiny import FACTS, TinyData
from torch import distributed
from bdclean.callbacks import AtomicCheckpointIO, ExactResume
from bdclean.training import Supervised
from bdclean.types import ImageFacts

class Save(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):
            trainer.save_checkpoint(folder + "/third.ckpt")

def fit(path=None):
    seed_everything(0)
    module = Supervised(ImageFacts(**FACTS), width=4, batch_size=4)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, accumulate_grad_batches=2,
        logger=False, enable_progress_bar=False, enable_checkpointing=False, limit_val_batches=0,
        plugins=[AtomicCheckpointIO()], callbacks=[ExactResume(), *([] if path else [Save()])])
    trainer.fit(module, TinyData(), ckpt_path=path)
    return module.state_dict()

whole, resumed = fit(), fit(folder + "/third.ckpt")
assert all(torch.equal(whole[key], resumed[key]) for key in whole)
state = torch.load(folder + "/third.ckpt", weights_only=True)["callbacks"]["ExactResume"]
one, other = state["gradients"]["model.head.weight"]
assert not torch.equal(one, other)
print("equal") if distributed.get_rank() == 0 else None
"""


@pytest.mark.slow
@pytest.mark.ddp
def test_each_device_gets_its_own_gradients_back(tmp_path, run_script):
    tests = Path(__file__).parents[1]
    assert "equal" in run_script(DEVICES, tests, tmp_path)


# ---------------------------------------------------------------------- stopping, and refusals


def test_a_fit_that_was_stopped_early_is_not_extended(fit, tmp_path):
    def stopper():
        # the loss falls by less than this
        return EarlyStopping("train/loss", min_delta=100.0, patience=1)

    saves = Everywhere(tmp_path)
    whole, _, seen = fit("supervised", {"max_epochs": 6}, stopper(), saves)
    assert seen.events[-1][:2] == ("epoch", 1)
    resumed, _, after = fit("supervised", {"max_epochs": 6}, stopper(), path=saves.files[-1])
    assert after.events == []
    assert differing(state_of(whole), state_of(resumed)) == []
    *_, longer = fit("supervised", {"max_epochs": 6, "max_time": None}, path=saves.files[-1])
    assert longer.events != []


REFUSED = {
    "overfit_batches": (
        [],
        {"overfit_batches": 2},
        r"^trainer\.overfit_batches=2: .*take --trainer\.limit_train_batches\.$",
    ),
    "other numbers of steps in later epochs": (
        [GradientAccumulationScheduler({1: 2})],
        {},
        r"^trainer\.callbacks: GradientAccumulationScheduler .*accumulate_grad_batches\.$",
    ),
    "a checkpoint within a step": (
        [ModelCheckpoint(save_on_exception=True)],
        {},
        r"^ModelCheckpoint: .*leave it out \(--checkpoint\.save_on_exception false\)\.$",
    ),
    "an interval that no epoch has": (
        [],
        {"val_check_interval": 6, "limit_val_batches": 1.0},
        r"^trainer\.val_check_interval=6: an epoch has 5 batches; .*every_n_epoch null\.$",
    ),
    "another one": ([OnExceptionCheckpoint("never")], {}, "^OnExceptionCheckpoint: .*leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["supervised", "bcu"])
def test_what_cannot_go_on_exactly_is_refused(case, method, fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the last one would save
    callbacks, limits, message = REFUSED[case]
    if method == "bcu":
        message = message.replace("has 5", "has 4")
    with pytest.raises(ConfigError, match=message):
        fit(method, limits, *callbacks)
