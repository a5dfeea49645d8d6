"""Where the supervised module takes its network from."""

from dataclasses import replace

import pytest
import torch
from grouping import make_of
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.callbacks import ExactResume
from bdclean.data import Digits, Splits
from bdclean.errors import ConfigError
from bdclean.functional.pgd import PGD
from bdclean.modules.recipe import Recipe
from bdclean.purification import BCU, CBD
from bdclean.training import AdversarialTraining, LinearProbe, SimCLR, Supervised
from bdclean.types import ImageFacts

FACTS = ImageFacts(3, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
DIGITS = ImageFacts(10, 32, Digits.mean, Digits.std)


@pytest.fixture
def narrow(tmp_path):
    model = build(ModelInfo("resnet18", 3, 16, FACTS.mean, FACTS.std, width=4))
    save_model(model, tmp_path / "narrow.safetensors")
    return model, str(tmp_path / "narrow.safetensors")


def test_a_new_network_is_the_standard_one():
    info = Supervised(FACTS).model.info
    assert (info.arch, info.width, info.stem) == ("resnet18", 64, "cifar")


def test_weights_say_what_network_they_are_for(narrow):
    model, weights = narrow
    module = Supervised(FACTS, weights=weights)
    assert module.model.info == model.info
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_width_than_that_of_the_weights_is_refused(narrow):
    with pytest.raises(ConfigError, match=r"width=64.*was made with width=4\. Leave width out"):
        Supervised(FACTS, weights=narrow[1], width=64)


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"limit_train_batches": 2, "limit_val_batches": 0, "enable_checkpointing": False}


def fit(make, epochs, path=None, given=True):
    data = Digits(splits=Splits(defense=100, probe=100))
    module = make(epochs)
    trainer = Trainer(max_epochs=epochs if given else -1, **QUIET)
    trainer.fit(module, data, ckpt_path=path)
    return trainer


class Stop(Callback):
    """Stops within an epoch, as `max_time` does."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.parametrize("kind", [Supervised, SimCLR])
def test_a_run_that_was_stopped_goes_on_within_its_epoch(kind, tmp_path):
    def run(*callbacks, path=None, **arguments):
        data = Digits(splits=Splits(defense=100, probe=100))
        torch.manual_seed(0)
        module = kind(DIGITS, width=4, batch_size=64)
        trainer = Trainer(
            max_epochs=2, callbacks=[ExactResume(), *callbacks], **(QUIET | arguments)
        )
        trainer.fit(module, data, ckpt_path=path)
        return module

    whole = run()
    kept = ModelCheckpoint(tmp_path, filename="last")
    run(Stop(), kept, enable_checkpointing=True)
    resumed = run(path=tmp_path / "last.ckpt")
    assert resumed.trainer.global_step == 4
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("key", "value"), [("batch_size", 0), ("label_smoothing", 1.5)])
def test_refuses_numbers_out_of_range(key, value):
    with pytest.raises(ConfigError, match=f"{key}={value}: it must be"):
        Supervised(FACTS, width=4, **{key: value})


@pytest.mark.parametrize("kind", [Supervised, SimCLR])
def test_what_the_optimizer_refuses_is_told(kind):
    def make(_):
        return kind(DIGITS, width=4, optimizer=lambda p: torch.optim.SGD(p, lr=-0.1))

    with pytest.raises(ConfigError, match=r"model.optimizer: Invalid learning rate: -0.1"):
        fit(make, 1)


CANNOT = {
    "closure": (lambda p: torch.optim.LBFGS(p), "LBFGS: it computes the loss several times"),
    "sparse": (
        lambda p: torch.optim.SparseAdam(p),
        r"SparseAdam: it cannot train this network \(SparseAdam does not support dense",
    ),
    "devices": (
        lambda p: torch.optim.Adam(p, capturable=True),
        r"Adam: it cannot train this network \(If capturable=True, params",
    ),
    "leaf": (
        lambda p: torch.optim.Adam(p, differentiable=True),
        r"Adam: it cannot train this network \(a leaf Variable",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
@pytest.mark.parametrize("kind", [Supervised, SimCLR])
def test_an_optimizer_that_cannot_train_the_network_is_told(kind, case):
    optimizer, message = CANNOT[case]
    if (kind, case) == (SimCLR, "closure"):
        message = "LBFGS doesn't support per-parameter options"  # which SimCLR has
    with pytest.raises(ConfigError, match=rf"optimizer(=|: ){message}"):
        fit(lambda _: kind(DIGITS, width=4, optimizer=optimizer), 1)


@pytest.mark.parametrize(("key", "value"), [("lr", 1e300), ("weight_decay", 1e31)])
def test_a_number_that_float32_cannot_hold_is_told(key, value):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, **({"lr": 0.1} | {key: value}))

    with pytest.raises(ConfigError, match=rf"optimizer\.{key}=.*: it must be at most 1e\+30"):
        fit(lambda _: Supervised(DIGITS, width=4, optimizer=optimizer), 1)
    with pytest.raises(ConfigError, match=rf"^{key}=.*: it must be at most 1e\+30"):
        Recipe(**{key: value})


def test_an_error_of_the_step_is_not_the_optimizers():
    class Odd(Supervised):
        def training_step(self, batch, batch_idx):
            raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        fit(lambda _: Odd(DIGITS, width=4), 1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_refuses_weights_in_half_precision(precision):
    trainer = Trainer(**QUIET, max_epochs=1, precision=precision)
    module = Supervised(DIGITS, width=4)
    for run in trainer.fit, trainer.test:
        with pytest.raises(ConfigError, match=f"trainer.precision={precision}.*take bf16-mixed"):
            run(module, Digits())


def supervised(schedule, kind=Supervised, **more):
    return lambda _: kind(DIGITS, width=4, schedule=schedule, **more)


@pytest.mark.parametrize(
    "make",
    [
        supervised("cosine"),
        supervised("onecycle"),
        supervised("multistep"),
        supervised("cosine", AdversarialTraining, pgd=PGD(8.0, 1)),
    ],
)
def test_a_resumed_fit_keeps_its_length(make, tmp_path):
    fit(make, 1).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="run is 2 steps long, and this one 4"):
        fit(make, 2, tmp_path / "x.ckpt")


def test_a_constant_rate_may_go_on(tmp_path):
    fit(supervised("constant"), 1).save_checkpoint(tmp_path / "x.ckpt")
    assert fit(supervised("constant"), 2, tmp_path / "x.ckpt").global_step == 4


@pytest.mark.parametrize(("kind", "name"), [(BCU, "distil"), (LinearProbe, "probe")])
def test_methods_with_epochs_of_their_own_keep_them(kind, name, tmp_path):
    weights = tmp_path / "digits.safetensors"
    save_model(build(ModelInfo("resnet18", 10, 32, Digits.mean, Digits.std, width=4)), weights)

    def make(epochs):
        recipe = {"epochs": epochs, "batch_size": 16}
        group = {"recipe": recipe} if kind is BCU else {"probe": {"recipe": recipe}}
        return make_of(kind, {"facts": DIGITS, "weights": str(weights)}, group)

    fit(make, 1, given=False).save_checkpoint(tmp_path / "x.ckpt")
    message = f"Stage 1 of the checkpoint's run: {name}, 1 epochs; of this run: {name}, 2 epochs"
    with pytest.raises(ConfigError, match=message):
        fit(make, 2, tmp_path / "x.ckpt", given=False)


@pytest.mark.parametrize("kind", [BCU, LinearProbe])
def test_methods_with_epochs_of_their_own_keep_the_steps_of_one(kind, tmp_path):
    weights = tmp_path / "digits.safetensors"
    save_model(build(ModelInfo("resnet18", 10, 32, Digits.mean, Digits.std, width=4)), weights)

    def make(size):
        recipe = {"epochs": 2, "batch_size": size}
        group = {"recipe": recipe} if kind is BCU else {"probe": {"recipe": recipe}}
        return make_of(kind, {"facts": DIGITS, "weights": str(weights)}, group)

    class Stopped(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    data = {"splits": Splits(defense=100, probe=100)}
    first = Trainer(max_epochs=-1, callbacks=[Stopped()], **(QUIET | {"limit_train_batches": 1.0}))
    first.fit(make(20), Digits(**data))
    first.save_checkpoint(tmp_path / "x.ckpt")
    second = Trainer(max_epochs=-1, **(QUIET | {"limit_train_batches": 1.0}))
    with pytest.raises(ConfigError, match="run has 5 steps, and one of this run 4"):
        second.fit(make(25), Digits(**data), ckpt_path=tmp_path / "x.ckpt")


def test_what_was_loaded_and_is_not_resumed_may_have_any_length(tmp_path):
    fit(supervised("cosine"), 1).save_checkpoint(tmp_path / "x.ckpt")
    module = Supervised.load_from_checkpoint(tmp_path / "x.ckpt")
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, Digits(splits=Splits(defense=100, probe=100)))
    assert trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("classes", [7, None])
def test_a_head_that_was_drawn_is_trained_and_not_measured(classes, tmp_path):
    weights = str(tmp_path / "other.safetensors")
    info = ModelInfo("resnet18", classes, 32, Digits.mean, Digits.std, width=4)
    save_model(build(info), weights)
    data = Digits(splits=Splits(defense=100, probe=100, val=50))

    def make():
        return Supervised(DIGITS, weights=weights, schedule="constant")

    trainer = Trainer(
        **(QUIET | {"max_epochs": 1, "limit_test_batches": 1, "limit_val_batches": 1})
    )
    for evaluate in trainer.test, trainer.validate:
        with pytest.raises(
            ConfigError,
            match=r"weights=\S+other.safetensors: the file has no classifier for the 10",
        ):
            evaluate(make(), data, verbose=False)
    module = make()
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    Trainer(limit_test_batches=1, **QUIET).test(
        make(), data, ckpt_path=tmp_path / "x.ckpt", verbose=False
    )


@pytest.mark.parametrize("kind", [CBD, BCU, LinearProbe])
def test_a_classifier_of_other_classes_is_not_measured(kind, narrow):
    data = Digits(splits=Splits(defense=100, probe=100))
    module = kind(replace(DIGITS, input_size=16), weights=narrow[1])
    with pytest.raises(ConfigError, match="the classifier has 3 classes and the data 10"):
        Trainer(**QUIET).test(module, data, verbose=False)


def test_weights_for_other_classes_get_a_new_head(narrow):
    module = Supervised(replace(FACTS, num_classes=5), weights=narrow[1])
    assert module.model(torch.rand(2, 3, 16, 16)).shape == (2, 5)
