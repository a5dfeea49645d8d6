"""Lines and bars of progress show the stage, its losses, and how long the fit still takes."""

from types import SimpleNamespace

import pytest

from bdclean import progress as timing
from bdclean.callbacks import progress
from bdclean.callbacks.progress import ProgressLines, StageBar
from bdclean.modules import Stage, StagedModule

BATCH = {"index": range(10)}


class Fit:
    """A fit of which the clock stands still between batches."""

    def __init__(self, monkeypatch, max_epochs=5, batches=4):
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        self.trainer = SimpleNamespace(
            is_global_zero=True,
            world_size=1,
            max_epochs=max_epochs,
            current_epoch=0,
            num_training_batches=batches,
            callback_metrics={},
        )
        self.module = SimpleNamespace(stage_name=None)

    def epoch(self, callback, number, seconds, batches=None):
        """Trains an epoch, or some batches of one, of so many seconds each."""
        self.trainer.current_epoch = number
        total = self.trainer.num_training_batches
        for k in range(total if batches is None else batches):
            callback.on_train_batch_start(self.trainer, self.module, BATCH, k)
            self.now += seconds
            callback.on_train_batch_end(self.trainer, self.module, None, BATCH, k)
        if batches is None:
            callback.on_train_epoch_end(self.trainer, self.module)


@pytest.fixture
def fit(monkeypatch):
    return Fit(monkeypatch)


def test_a_stage_shows_its_own_loss(fit, capsys):
    lines = ProgressLines()
    epochs = [
        {"train/loss": 2.0, "val/acc": 50.0},
        {"train/loss": 1.5},
        {"train/loss": 1.5, "train/unlearn_loss": -0.25},
        {"train/loss": 1.5, "train/unlearn_loss": -0.25, "train/relearn_loss": 0.5},
        {"train/loss": 1.25, "train/unlearn_loss": -0.5},
    ]
    fit.trainer.num_training_batches = 1
    lines.on_train_start(fit.trainer, None)
    for number, fit.trainer.callback_metrics in enumerate(epochs):
        fit.epoch(lines, number, seconds=40)
    shown = [line.split("  ")[1:-2] for line in capsys.readouterr().err.splitlines()]
    assert shown == [
        ["loss 2.0000"],
        ["loss 1.5000"],
        ["unlearn_loss -0.2500"],
        ["relearn_loss 0.5000"],
        ["loss 1.2500"],
    ]


def test_a_long_epoch_tells_its_end_within_half_a_minute(fit, capsys):
    lines = ProgressLines()
    lines.on_train_start(fit.trainer, fit.module)
    fit.epoch(lines, 0, seconds=20, batches=3)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "epoch 1/5, batch 1/4  0.50 images/s  20 s passed, 6 min 20 s left",
        "epoch 1/5, batch 3/4  0.50 images/s  1 min passed, 5 min 40 s left",
    ]


def test_short_epochs_are_told_rarely(fit, capsys):
    lines = ProgressLines()
    lines.on_train_start(fit.trainer, fit.module)
    for number in range(5):
        fit.epoch(lines, number, seconds=0.1)
    told = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in told] == ["epoch 1/5", "epoch 5/5"]
    assert told[-1].endswith("2 s passed, 0 s left")


def test_the_estimate_is_that_of_the_present_stage(fit, capsys):
    lines = ProgressLines()
    lines.on_train_start(fit.trainer, fit.module)
    fit.module.stage_name = "purify"
    fit.epoch(lines, 0, seconds=30)
    fit.module.stage_name = "probe"
    fit.epoch(lines, 1, seconds=1)
    told = capsys.readouterr().err.splitlines()
    assert told[-2] == "purify: epoch 1/5  0.33 images/s  2 min passed, 8 min left"
    assert told[-1] == "probe: epoch 2/5  10.0 images/s  2 min 4 s passed, 12 s left"


class Planned(StagedModule):
    """Two rounds of two stages, and a long last one."""

    stage_name = "train"

    def plan(self):
        one_round = Stage("score"), Stage("learn", epochs=1), Stage("forget", epochs=1)
        return (Stage("train", epochs=2), *one_round, *one_round, Stage("retrain", epochs=4))

    def make_networks(self):
        """None."""


def test_each_stage_is_estimated_from_its_own_epochs(fit, capsys):
    """4 batches an epoch; `about` as long as a stage is ahead that has not trained yet."""
    lines = ProgressLines()
    fit.trainer.max_epochs, fit.module = 10, Planned()
    lines.on_train_start(fit.trainer, fit.module)
    ends = []
    one_round = ("learn", 5), ("forget", 1)
    epochs = ("train", 10), ("train", 10), *one_round, *one_round, ("retrain", 25), ("retrain", 25)
    for number, (stage, seconds) in enumerate(epochs):
        fit.module.stage_name = stage
        fit.epoch(lines, number, seconds)
        ends.append(capsys.readouterr().err.splitlines()[-1:])
    told = [line.rpartition(", ")[2] for lines in ends for line in lines]
    # 9 of 40 s; then 20 s of learn and 6 of the mean, 100 s for 3;
    # then 20 s of learn, 4 s of forget, and 4 of 104 s for 4.
    assert told[0] == "about 6 min left"
    assert told[2] == "about 3 min 40 s left"
    assert told[3] == "about 2 min 8 s left"
    assert told[-1] == "3 min 45 s left"  # 2.25 of 100 s, and not a mean with the short ones


def test_a_stage_that_comes_again_is_estimated_from_all_its_rounds(fit, capsys):
    lines = ProgressLines()
    fit.trainer.max_epochs, fit.module = 6, Planned()
    lines.on_train_start(fit.trainer, fit.module)
    told = []
    for number, (stage, seconds) in enumerate(
        [("train", 20), ("train", 20), ("learn", 30), ("forget", 5), ("learn", 10), ("forget", 8)]
    ):
        fit.module.stage_name = stage
        fit.epoch(lines, number, seconds)
        told.append(capsys.readouterr().err.splitlines()[-1].rpartition(", ")[2])
    assert told[3] == "2 min 20 s left"  # learn 120, forget 20
    assert told[4] == "20 s left"


def test_work_between_two_stages_is_of_the_second_one(fit, capsys):
    """Each round begins with 50 s in which no batch is trained; epochs take 120 s."""
    lines = ProgressLines()
    fit.trainer.max_epochs, fit.module = 6, Planned()
    lines.on_train_start(fit.trainer, fit.module)
    told = []
    for number, stage in enumerate(("train", "train", "learn", "forget", "learn")):
        fit.now += 50 if stage == "learn" else 0
        fit.module.stage_name = stage
        fit.epoch(lines, number, seconds=30)
        told.append(capsys.readouterr().err.splitlines()[-1].rpartition(", ")[2])
    assert told[3] == "4 min 50 s left"  # learn 170, forget 120
    assert told[4] == "2 min left"


def test_a_new_stage_does_not_show_what_the_old_one_logged_last(fit, capsys):
    """The last loss of the old stage came after its last line, so it looks new."""
    lines = ProgressLines()
    fit.module.stage_name = "purify"
    lines.on_train_start(fit.trainer, fit.module)
    for number, loss in enumerate((3.0, 2.0)):
        fit.trainer.callback_metrics = {"train/loss": loss}
        fit.epoch(lines, number, seconds=1)
    fit.module.stage_name = "probe"
    fit.epoch(lines, 2, seconds=40, batches=3)
    told = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in told] == [
        ["purify: epoch 1/5", "loss 3.0000"],
        ["probe: epoch 3/5, batch 1/4", "0.25 images/s"],
        ["probe: epoch 3/5, batch 2/4", "0.25 images/s"],
        ["probe: epoch 3/5, batch 3/4", "0.25 images/s"],
    ]


def test_a_resumed_fit_counts_what_it_trains_itself(fit, capsys):
    lines = ProgressLines()
    lines.on_train_start(fit.trainer, fit.module)
    fit.epoch(lines, 3, seconds=10)
    assert capsys.readouterr().err.endswith("40 s passed, 40 s left\n")


def test_a_fit_without_end_tells_its_speed(fit, capsys):
    lines = ProgressLines()
    fit.trainer.max_epochs = -1
    lines.on_train_start(fit.trainer, fit.module)
    fit.epoch(lines, 0, seconds=10)
    assert capsys.readouterr().err.endswith("epoch 1  1.00 images/s  40 s passed\n")


def test_other_processes_say_nothing(fit, capsys):
    lines = ProgressLines()
    fit.trainer.is_global_zero = False
    lines.on_train_start(fit.trainer, fit.module)
    fit.epoch(lines, 0, seconds=100)
    assert capsys.readouterr().err == ""


def test_the_bar_names_the_stage_and_the_end(fit, monkeypatch):
    bar = StageBar()
    above = progress.RichProgressBar
    for hook in ("on_train_start", "on_train_batch_start", "on_train_batch_end"):
        monkeypatch.setattr(above, hook, lambda *args, **kwargs: None)
    monkeypatch.setattr(above, "get_metrics", lambda *args: {"train/loss": 1.0})
    bar.on_train_start(fit.trainer, fit.module)
    assert bar.get_metrics(fit.trainer, fit.module) == {"train/loss": 1.0}
    fit.module.stage_name = "purify"
    fit.epoch(bar, 0, seconds=30, batches=2)
    shown = bar.get_metrics(fit.trainer, fit.module)
    assert list(shown.items()) == [
        ("stage", "purify"),
        ("train/loss", 1.0),
        ("fit", "9 min left"),
    ]
