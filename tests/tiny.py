"""A tiny data set, a tiny suspect and a quiet Trainer: a plugin of `conftest.py`."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.callbacks.resume import ExactResume
from bdclean.checking import (
    PROBES,
    MarginTest,
    TriggerSearch,
    maximum_margins,
    smallest_trigger,
)
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.poisoned_set import PoisonedSet
from bdclean.data.splits import Splits
from bdclean.types import ImageFacts

QUIET = (
    # Sixty images in memory need no worker processes.
    "ignore:The '.*_dataloader' does not have many workers",
    # Lightning 2.6 flattens containers with a class that newer torch has deprecated.
    "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning",
    # There are no validation images.
    "ignore:Total length of `list` across ranks is zero",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    # Runs are resumed without the callback that wrote their checkpoint.
    "ignore:Be aware that when using `ckpt_path`, callbacks used",
)
FACTS = {
    "num_classes": 4,
    "input_size": 8,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.25),
}


class TinyData(ImageDataModule):
    name, num_classes, input_size = "tiny", FACTS["num_classes"], FACTS["input_size"]
    mean, std = FACTS["mean"], FACTS["std"]

    def __init__(self, shuffle_labels=False):
        super().__init__(splits=Splits(defense=24, probe=16), shuffle_seed=3)
        self.shuffle_labels = shuffle_labels
        self.asked, self.keys = [], []

    def _read(self, rows):
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(rows) % 4
        images = torch.randint(0, 60, (rows, 3, 8, 8), generator=generator)
        images += 45 * labels[:, None, None, None]
        return ImageSet(images.to(torch.uint8), labels)

    def read_train(self):
        return self._read(64)

    def read_test(self):
        return self._read(20)

    def set_view(self, view):
        super().set_view(view)
        self.asked.append(view)

    def role_images(self, role, *, labels):
        images = super().role_images(role, labels=labels)
        if self.shuffle_labels and labels:
            images.columns["label"] = images.columns["label"].flip(0)
        return images

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.keys.append((self.view.role, frozenset(batch)))
        return super().on_after_batch_transfer(batch, dataloader_idx)


@pytest.fixture
def facts():
    """What the command line links from the data module."""
    return {"facts": ImageFacts(**FACTS)}


@pytest.fixture
def make_data():
    return TinyData


@pytest.fixture
def make_poisoned(make_data):
    """Poisoned data; `told=False` gives the same images and labels, and no truth about them."""

    def make(told=True):
        poisoned = make_data()
        poisoned.attack = BadNets(target=1, rate=0.25)
        if told:
            return poisoned
        shown, rows = make_data(), poisoned.rows.train
        stored = poisoned.stored
        images, labels = stored.images.clone(), stored.labels.clone()
        images[rows] = poisoned.training_images(torch.arange(len(rows)))
        labels[rows] = poisoned.training_set().labels
        assert not torch.equal(images, stored.images)
        assert not torch.equal(labels, stored.labels)
        shown.poisoned_set = PoisonedSet(ImageSet(images, labels), poisoned.rows, 4)
        assert shown.training_set().poisoned is None
        return shown

    return make


@pytest.fixture
def suspect(tmp_path):
    """File of a small ResNet-18 with a head, whose batch norms are not at their start."""
    torch.manual_seed(5)
    info = ModelInfo("resnet18", 4, 8, FACTS["mean"], FACTS["std"], width=4)
    model = build(info)
    for _ in range(3):
        model(torch.rand(16, 3, 8, 8))
    path = str(tmp_path / "suspect.safetensors")
    save_model(model, path)
    return path


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, name="run", **arguments):
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "limit_val_batches": 0,
            "reload_dataloaders_every_n_epochs": 1,
            "default_root_dir": tmp_path / name,
            "callbacks": [ExactResume(), *callbacks],
        }
        return Trainer(**(settings | arguments))

    return make


@pytest.fixture
def cut(make_trainer, tmp_path):
    """Fits as far as a step and stops, as `max_time` does; gives the checkpoint."""

    class Stop(Callback):
        def __init__(self, step):
            self.step = step

        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= self.step

    def fit(module, data, step):
        folder = tmp_path / "cut"
        kept = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
        make_trainer(kept, Stop(step), name="cut").fit(module, data)
        return folder / "last.ckpt"

    return fit


@pytest.fixture
def every_epoch(tmp_path):
    """A callback that keeps the checkpoint of every epoch."""
    folder = tmp_path / "checkpoints"
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "make_trainer" in getattr(item, "fixturenames", ()):
            for line in QUIET:
                item.add_marker(pytest.mark.filterwarnings(line))


def make_tests_quick(monkeypatch):
    """The tests of check with too few steps to be of use, in no time."""
    margins = partial(maximum_margins, settings=MarginTest(starts=3, steps=3))
    trigger = partial(smallest_trigger, settings=TriggerSearch(epochs=1))
    monkeypatch.setattr("bdclean.checking.every.maximum_margins", margins)
    monkeypatch.setattr("bdclean.checking.every.smallest_trigger", trigger)
    for name, family in PROBES.items():
        monkeypatch.setitem(PROBES, name, replace(family, steps=1))


@pytest.fixture
def quick_tests(monkeypatch):
    make_tests_quick(monkeypatch)
