"""Callbacks that write down what a run does, and save it wherever it may be saved."""

from collections import Counter

from lightning.pytorch.callbacks import Callback, Checkpoint

HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")


class Seen(Callback):
    """What a run does, in order: which images, at which step, when it validates."""

    def __init__(self):
        self.events, self.before = [], 0

    def state_dict(self):
        return {"seen": self.before + len(self.events)}

    def load_state_dict(self, state):
        self.before = state["seen"]

    def note(self, what, trainer):
        loop = trainer.fit_loop.epoch_loop
        logged_at = loop._batches_that_stepped
        self.events.append((what, trainer.current_epoch, trainer.global_step, logged_at))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.note((batch_idx, batch["index"].tolist()), trainer)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.note("validation", trainer)

    def on_train_epoch_end(self, trainer, module):
        self.note("epoch", trainer)


class Everywhere(Checkpoint):
    """Saves at every moment at which a checkpoint may be written."""

    def __init__(self, folder):
        self.folder, self.files = folder, []

    def save(self, trainer):
        if not trainer.sanity_checking:
            self.files.append(self.folder / f"{len(self.files)}.ckpt")
            trainer.save_checkpoint(self.files[-1])

    def on_train_batch_start(self, trainer, *_):
        self.save(trainer)

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer)

    def on_validation_end(self, trainer, *_):
        self.save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer)


class Count(Callback):
    """How often each hook is called."""

    def __init__(self):
        self.calls = Counter()
        for hook in HOOKS:
            setattr(self, hook, lambda *_, hook=hook, **__: self.calls.update([hook]))
