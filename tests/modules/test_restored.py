"""Checkpoints that somebody has made by hand: one sentence each, and the run is left as it was."""

import copy
import math

import pytest
import torch
from grouping import make_of

from bdclean.callbacks import AtomicCheckpointIO
from bdclean.errors import ConfigError
from bdclean.modules.checkpoints import none_of_ours, record_of
from bdclean.modules.restored import check_state
from bdclean.purification import BCU

pytestmark = pytest.mark.filterwarnings("ignore")
HONEST = []  # made once: everything here is a copy that is damaged
OURS = "bdclean"
FIT = ("loops", "fit_loop")
OPTIMIZED = (*FIT, "epoch_loop.automatic_optimization.optim_progress")
EPOCHS = (*FIT, "epoch_progress", "current")
OPTIMIZER = ("optimizer_states", 0)
GROUP = (*OPTIMIZER, "param_groups", 0)
SCHEDULER = ("lr_schedulers", 0)
SAVED = "ModelCheckpoint"
WEIGHT = "model.backbone.conv1.weight"
MISSING = object()


@pytest.fixture
def make(suspect, facts):
    small = {"recipe": {"epochs": 2, "batch_size": 8}}
    return lambda: make_of(BCU, facts, {"weights": suspect}, small)


@pytest.fixture
def honest(make, make_data, make_trainer, every_epoch, tmp_path):
    """The content of a checkpoint after one of two epochs, and the Trainer that wrote it."""
    if not HONEST:
        trainer = make_trainer(every_epoch, name="first")
        trainer.fit(make(), make_data())
        file = tmp_path / "checkpoints" / "epoch=0.ckpt"
        HONEST.append((torch.load(file, weights_only=True), trainer))
    return copy.deepcopy(HONEST[0][0]), HONEST[0][1]


@pytest.fixture
def go_on(make, make_data, make_trainer, tmp_path):
    """Goes on from a checkpoint of this content; gives what is said of it."""

    def go_on(content):
        path = tmp_path / "last.ckpt"
        torch.save(content, path)
        before = path.read_bytes()
        trainer = make_trainer(name="again", plugins=[AtomicCheckpointIO()])
        try:
            trainer.fit(make(), make_data(), ckpt_path=path)
        except ConfigError as error:
            assert path.read_bytes() == before
            return str(error).removeprefix(f"--ckpt_path {path}").removeprefix(": ")
        return "goes on"

    return go_on


def damaged(content, keys, value):
    """Puts a value in place; the key of a callback is found by the start of its name."""
    *before, last = keys
    for key in before:
        content = content[found(content, key)]
    last = found(content, last)
    if value is MISSING:
        del content[last]
    else:
        content[last] = value(content.get(last)) if callable(value) else value


def found(content, key):
    if isinstance(content, dict) and isinstance(key, str) and key not in content:
        return next((name for name in content if str(name).startswith(key)), key)
    return key


# What is said of a checkpoint, then where its content is another, and which one. Of our entry:
OURS_ODD = {
    f"its entry {OURS}.networks is of a wrong type": {
        "networks are a list": ((OURS, "networks"), [1]),
        "networks are none": ((OURS, "networks"), None),
        "a network is a number": ((OURS, "networks", "model"), 3),
        "a width is a number": ((OURS, "networks", "model", "width"), 4),
    },
    f"its entry {OURS}.plan is of a wrong type": {
        "a plan is no list": ((OURS, "plan"), 3),
        "a plan is a text": ((OURS, "plan"), "purify"),
        "a plan of numbers": ((OURS, "plan"), [1]),
        "a plan of names": ((OURS, "plan"), [("purify",)]),
        "a plan is a dictionary": ((OURS, "plan"), {"purify": 2}),
    },
    f"its entry {OURS}.stage is of a wrong type": {
        "a stage is none": ((OURS, "stage"), None),
        "a stage is a text": ((OURS, "stage"), "0"),
        "a stage is half a one": ((OURS, "stage"), 0.5),
        "a stage is true": ((OURS, "stage"), True),
        "a stage is below 0": ((OURS, "stage"), -1),
    },
    f"its entry {OURS}.steps is of a wrong type": {
        "steps are none": ((OURS, "steps"), None),
        "steps are a text": ((OURS, "steps"), "3"),
        "steps are below 0": ((OURS, "steps"), -3),
    },
    f"its entry {OURS}.results is of a wrong type": {
        "results are none": ((OURS, "results"), None),
        "results are a list": ((OURS, "results"), [1]),
        "a result is a number": ((OURS, "results"), {"score": 3}),
    },
}
# Of what Lightning restores:
STATE_ODD = {
    "its entry loops.fit_loop is odd or missing": {"no loop": (FIT, MISSING)},
    "its entry loops.fit_loop.epoch_progress is odd or missing": {
        "no epochs": ((*FIT, "epoch_progress"), MISSING),
        "epochs are a number": ((*FIT, "epoch_progress"), 3),
    },
    "its entry loops.fit_loop.epoch_progress.current is odd or missing": {
        "counts are a list": (EPOCHS, []),
    },
    "its entry loops.fit_loop.epoch_progress.current.processed is odd or missing": {
        "a count is none": ((*EPOCHS, "processed"), None),
        "a count is a text": ((*EPOCHS, "processed"), "1"),
        "a count is below 0": ((*EPOCHS, "processed"), -5),
        "a count is true": ((*EPOCHS, "processed"), True),
        "a count is endless": ((*EPOCHS, "processed"), 1e30),
        "a count is whole and a float": ((*EPOCHS, "processed"), 1.0),
        "a count is no number": ((*EPOCHS, "processed"), math.nan),
        "a count is a tensor": ((*EPOCHS, "processed"), torch.tensor(1)),
        "a count is too large": ((*EPOCHS, "processed"), 10**30),
        "more epochs were processed than started": ((*EPOCHS, "processed"), 2),
    },
    "its entry loops.fit_loop.epoch_loop.batch_progress.total.ready is odd or missing": {
        "a count of batches is a float": (
            (*FIT, "epoch_loop.batch_progress", "total", "ready"),
            1e30,
        ),
    },
    "its entry loops.fit_loop.epoch_loop.batch_progress.current.started is odd or missing": {
        "more batches have started than were ready": (
            (*FIT, "epoch_loop.batch_progress", "current", "started"),
            lambda count: count + 1,
        ),
    },
    "its entry global_step is odd or missing": {
        "another number of steps": (("global_step",), 99),
        "other steps than the loops have counted": (
            (*OPTIMIZED, "optimizer", "step", "total", "completed"),
            0,
        ),
    },
    "its entry loops.fit_loop.epoch_loop.batch_progress is odd or missing": {
        "batches are none": ((*FIT, "epoch_loop.batch_progress"), None),
    },
    "its entry loops.fit_loop.epoch_loop.batch_progress.is_last_batch is odd or missing": {
        "a switch is a text": ((*FIT, "epoch_loop.batch_progress", "is_last_batch"), "no"),
    },
    "its entry loops.fit_loop.epoch_loop.state_dict._batches_that_stepped is odd or missing": {
        "steps of the logger": ((*FIT, "epoch_loop.state_dict", "_batches_that_stepped"), "x"),
    },
    "its entry optimizer_states is odd or missing": {
        "no optimizer": (("optimizer_states",), []),
        "two optimizers": (("optimizer_states",), lambda states: states * 2),
    },
    "its entry optimizer_states.0 is odd or missing": {
        "an optimizer is a number": (OPTIMIZER, 1),
        "an optimizer without groups": ((*OPTIMIZER, "param_groups"), MISSING),
        "an optimizer without a state": ((*OPTIMIZER, "state"), MISSING),
    },
    "its entry optimizer_states.0.param_groups is odd or missing": {
        "groups are none": ((*OPTIMIZER, "param_groups"), []),
        "a group without a rate": ((*GROUP, "lr"), MISSING),
    },
    "its entry optimizer_states.0.param_groups.0.lr is odd or missing": {
        "a rate is a text": ((*GROUP, "lr"), "fast"),
    },
    "its entry optimizer_states.0.param_groups.0.params is odd or missing": {
        "too few parameters": ((*GROUP, "params"), [1]),
        "parameters in another order": ((*GROUP, "params"), lambda ids: ids[::-1]),
        "parameters named twice": ((*GROUP, "params"), lambda ids: [0, *ids[:-1]]),
        "parameters that are not there": ((*GROUP, "params"), lambda ids: [i + 1 for i in ids]),
        "parameters below 0": ((*GROUP, "params"), lambda ids: [i - len(ids) for i in ids]),
        "parameters by floats": ((*GROUP, "params"), lambda ids: [float(i) for i in ids]),
    },
    "its entry optimizer_states.0.param_groups.0.params.0 is odd or missing": {
        "parameters by truths": ((*GROUP, "params"), lambda ids: [False, True, *ids[2:]]),
    },
    "its entry optimizer_states.0.state.-1 is odd or missing": {
        "a momentum of a parameter below 0": (
            (*OPTIMIZER, "state"),
            lambda state: state | {-1: state[0]},
        ),
    },
    "its entry optimizer_states.0.state.999 is odd or missing": {
        "a momentum of no parameter": (
            (*OPTIMIZER, "state"),
            lambda state: state | {999: state[0]},
        ),
    },
    "its entry optimizer_states.0.state is odd or missing": {
        "a state is a list": ((*OPTIMIZER, "state"), [1]),
    },
    "its entry optimizer_states.0.state.0 is odd or missing": {
        "a momentum is a number": ((*OPTIMIZER, "state", 0), 3),
        "a momentum of another shape": (
            (*OPTIMIZER, "state", 0, "momentum_buffer"),
            torch.zeros(7),
        ),
    },
    "its entry lr_schedulers is odd or missing": {"no schedule": (("lr_schedulers",), [])},
    "its entry lr_schedulers.0 is odd or missing": {"a schedule is a number": (SCHEDULER, 1)},
    "its entry lr_schedulers.0.last_epoch is odd or missing": {
        "a schedule that ended at a text": ((*SCHEDULER, "last_epoch"), "1"),
        "a schedule without its epoch": ((*SCHEDULER, "last_epoch"), MISSING),
        "a schedule that ended at half a step": ((*SCHEDULER, "last_epoch"), 0.5),
        "a schedule that ended nowhere": ((*SCHEDULER, "last_epoch"), 1e30),
    },
    "its entry lr_schedulers.0.step is odd or missing": {
        "a schedule whose method is hidden": ((*SCHEDULER, "step"), 3),
    },
    "its entry lr_schedulers.0.optimizer is odd or missing": {
        "a schedule of another optimizer": ((*SCHEDULER, "optimizer"), 3),
    },
}
# By a fit that is to go on; "..." stands for more:
RESUMED = {
    f"its gradient of {WEIGHT} is odd, so it is no whole checkpoint of a run of bdclean; ...": {
        "a gradient is a number": (("callbacks", "ExactResume", "gradients"), {WEIGHT: 3}),
        "a gradient of another shape": (
            ("callbacks", "ExactResume", "gradients"),
            {WEIGHT: torch.zeros(1, 2)},
        ),
    },
    "the checkpoint is of an earlier version of bdclean, or not of a run of bdclean; ...": {
        "no entry of ours": ((OURS,), MISSING),
        "our entry is a list": ((OURS,), [1]),
        "our entry is none": ((OURS,), None),
    },
    "the checkpoint was written by 3, and this is bcu. ...": {"a number": ((OURS, "method"), 3)},
    "the checkpoint is damaged, or of another version of bdclean (KeyError: 'networks'); ...": {
        "no networks": ((OURS, "networks"), MISSING),
    },
    "the checkpoint is damaged, or of another version of bdclean (KeyError: 'plan'); ...": {
        "no plan": ((OURS, "plan"), MISSING),
    },
    "the checkpoint is damaged, or of another version of bdclean (KeyError: 'results'); ...": {
        "no results": ((OURS, "results"), MISSING),
    },
    "the checkpoint is damaged, or of another version of bdclean (ValueError: stage 99 of 1)...": {
        "a stage that is not there": ((OURS, "stage"), 99),
    },
    "the checkpoint is damaged, or of another version of bdclean (its network model: its meta...": {
        "an architecture": ((OURS, "networks", "model", "arch"), '"nonsense"'),
    },
    "the checkpoint is damaged, or of another version of bdclean (its network model: no res...": {
        "an endless width": ((OURS, "networks", "model", "width"), "1000000000"),
    },
    "the checkpoint is damaged, or of another version of bdclean (its network model does not...": {
        "a large width": ((OURS, "networks", "model", "width"), "4096"),
        "endless classes": ((OURS, "networks", "model", "num_classes"), "1000000000000"),
        "weights of another shape": (("state_dict", WEIGHT), torch.zeros(2)),
        "weights are texts": (("state_dict", WEIGHT), "none"),
        "no weights": (("state_dict",), {}),
    },
    "its stage 2 has the epochs 2 to 2, and its loops have ended 1; it is damaged, so start ...": {
        "a stage that is too early": ((OURS, "stage"), 1),
    },
    "what it says that the run is made of is odd, so it is no whole checkpoint of a run of b...": {
        "a list of files": (("callbacks", "ExactResume", "made_of"), ["--model.weights"]),
        "files by numbers": (("callbacks", "ExactResume", "made_of"), {4: None}),
    },
    "goes on": {
        "an entry of others": (("theirs",), 3),
        "another version of Lightning": (("pytorch-lightning_version",), "99.0"),
        "a callback of others": (("callbacks", "Theirs"), {"a": 1}),
        "a number of hyper-parameters": (("hyper_parameters", "theirs"), math.inf),
    },
}


def table(groups):
    cases = [(name, *case, said) for said, made in groups.items() for name, case in made.items()]
    return [pytest.param(keys, value, said, id=name) for name, keys, value, said in cases]


@pytest.mark.parametrize(("keys", "value", "sentence"), table(OURS_ODD))
def test_our_entry_is_odd(keys, value, sentence, honest):
    record_of(honest[0], "bcu", "FILE")
    damaged(honest[0], keys, value)
    with pytest.raises(ConfigError) as told:
        record_of(honest[0], "bcu", "FILE")
    assert str(told.value) == f"FILE: {none_of_ours(sentence)}"


@pytest.mark.parametrize(("keys", "value", "sentence"), table(STATE_ODD))
def test_a_state_is_odd(keys, value, sentence, honest, monkeypatch):
    content, trainer = honest
    monkeypatch.setattr(trainer._checkpoint_connector, "_loaded_checkpoint", content)
    check_state(trainer, "FILE")
    damaged(content, keys, value)
    with pytest.raises(ConfigError) as told:
        check_state(trainer, "FILE")
    assert str(told.value) == f"FILE: {none_of_ours(sentence)}"


@pytest.mark.parametrize(("keys", "value", "sentence"), table(RESUMED))
def test_a_fit_is_to_go_on(keys, value, sentence, honest, go_on):
    damaged(honest[0], keys, value)
    said = go_on(honest[0])
    assert said.startswith(sentence[:-3]) if sentence.endswith("...") else said == sentence
    assert said.endswith((".", "goes on"))
    assert "\n" not in said
