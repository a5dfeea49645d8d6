"""Lines of progress show the losses of the present stage."""

from types import SimpleNamespace

from bdclean.callbacks.progress import ProgressLines


def test_a_stage_shows_its_own_loss(capsys):
    lines = ProgressLines()
    epochs = [
        {"train/loss": 2.0, "val/acc": 50.0},
        {"train/loss": 1.5},
        {"train/loss": 1.5, "train/unlearn_loss": -0.25},
        {"train/loss": 1.5, "train/unlearn_loss": -0.25, "train/relearn_loss": 0.5},
        {"train/loss": 1.25, "train/unlearn_loss": -0.5},
    ]
    trainer = SimpleNamespace(is_global_zero=True, world_size=1, max_epochs=5, current_epoch=0)
    lines.on_train_start(trainer, None)
    for trainer.current_epoch, trainer.callback_metrics in enumerate(epochs):
        lines.on_train_epoch_start(trainer, None)
        lines.on_train_epoch_end(trainer, None)
    shown = [line.split("  ")[1:-2] for line in capsys.readouterr().err.splitlines()]
    assert shown == [
        ["loss 2.0000"],
        ["loss 1.5000"],
        ["unlearn_loss -0.2500"],
        ["relearn_loss 0.5000"],
        ["loss 1.2500"],
    ]
