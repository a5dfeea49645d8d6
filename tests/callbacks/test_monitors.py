"""Callbacks of Lightning that wait for a metric, or do not fit a method."""

import pytest
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
)

from bdclean.callbacks import Monitors
from bdclean.errors import ConfigError
from bdclean.training import Supervised


@pytest.fixture
def fit(facts, make_data, make_trainer):
    def fit(*callbacks, **settings):
        module = Supervised(**facts, width=4)
        make_trainer(*callbacks, max_epochs=1, **settings).fit(module, make_data())

    return fit


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_metric_that_nothing_logs_is_named(kind, theirs, fit, tmp_path):
    waiting = kind(monitor="nope")
    section = "trainer.callbacks" if theirs else "checkpoint"
    with pytest.raises(ConfigError) as raised:
        fit(Monitors([waiting] if theirs else []), waiting)
    assert str(raised.value) == (
        f"--{section}.monitor=nope: {kind.__name__} waits for a metric that nothing logs; there "
        "are train/loss."
    )


def test_a_metric_that_is_there_is_waited_for(fit, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", monitor="train/loss")
    stop = EarlyStopping("train/loss")
    fit(Monitors(), kept, stop, EarlyStopping("nope", strict=False), ModelCheckpoint(tmp_path))
    assert kept.best_model_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (BackboneFinetuning(), "chooses itself which weights it trains; leave it out."),
        (ModelPruning("l1_unstructured"), "chooses itself which weights it trains; leave it out."),
        ("a file", "it would save a step that was cut short"),
    ],
    ids=["finetuning", "pruning", "exception"],
)
def test_what_does_not_fit_is_refused_before_it_does_anything(callback, said, fit, tmp_path):
    folder = tmp_path / "left"
    with pytest.raises(ConfigError, match=said):
        fit(
            OnExceptionCheckpoint(folder) if callback == "a file" else callback,
            enable_checkpointing=True,
        )
    assert not folder.exists()
