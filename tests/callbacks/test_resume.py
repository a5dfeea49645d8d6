"""A run goes on with the images, the poison plan and the weights files that it began with."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule

from bdclean.attacks import BadNets
from bdclean.backbones import load_model, save_model
from bdclean.callbacks import ExactResume
from bdclean.errors import ConfigError
from bdclean.training import Supervised


@pytest.fixture
def victim(facts):
    return lambda: Supervised(**facts, arch="resnet18", width=4, batch_size=8)


def changed(data, images=None, rows=None):
    """The same data module with other images, or fewer."""
    whole = data.read_train()
    if images is not None:
        whole.images[images] = 255 - whole.images[images]
    kept = slice(None, rows)
    data.read_train = lambda: type(whole)(whole.images[kept], whole.labels[kept])
    return data


CHANGES = {
    "an image": (lambda data: changed(data, images=5), "training images: 64 images, "),
    "fewer images": (lambda data: changed(data, rows=60), "-> 60 images, "),
    "an attack": (lambda data: data, "poison plan: .* -> "),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("ended", [False, True], ids=["unfinished", "ended"])
def test_other_data_is_refused(case, ended, victim, make_data, make_trainer, every_epoch, tmp_path):
    def data(seed=0):
        made = make_data()
        made.attack = BadNets(target=1, rate=0.25, seed=seed)
        return made

    make_trainer(every_epoch, max_epochs=2).fit(victim(), data())
    path = tmp_path / "checkpoints" / f"epoch={int(ended)}.ckpt"
    change, told = CHANGES[case]
    other = change(data(seed=int(case == "an attack")))
    with pytest.raises(ConfigError, match=f"^--ckpt_path {path}: .*{told}.*start a new run"):
        make_trainer(name="again", max_epochs=2).fit(victim(), other, ckpt_path=path)
    make_trainer(name="again", max_epochs=2).fit(victim(), data(), ckpt_path=path)


@pytest.mark.parametrize("named", [True, False], ids=["by the command", "by the module"])
def test_another_suspect_is_refused(
    named, suspect, facts, make_data, make_trainer, every_epoch, tmp_path
):
    def fit(path=None):
        module = Supervised(**facts, weights=suspect, batch_size=8)
        kept = [] if path else [every_epoch]
        trainer = make_trainer(*kept, name=f"run{path is None}", max_epochs=2)
        trainer.callbacks[0].files = {"model.weights": suspect} if named else None
        trainer.fit(module, make_data(), ckpt_path=path)

    fit()
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"
    model = load_model(suspect)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    save_model(model, suspect)
    with pytest.raises(ConfigError, match=r"--model\.weights: sha256 \w+ -> sha256 \w+; bring"):
        fit(path)


def test_a_user_sees_where_a_run_goes_on(
    victim, make_data, make_trainer, every_epoch, tmp_path, capsys
):
    make_trainer(every_epoch, max_epochs=2).fit(victim(), make_data())
    assert capsys.readouterr().err == ""
    first, last = (tmp_path / "checkpoints" / f"epoch={epoch}.ckpt" for epoch in (0, 1))
    make_trainer(name="again", max_epochs=2).fit(victim(), make_data(), ckpt_path=first)
    assert capsys.readouterr().err == f"Goes on from {first}: epoch 2 of 2, after 3 steps.\n"
    make_trainer(name="ended", max_epochs=2).fit(victim(), make_data(), ckpt_path=last)
    assert capsys.readouterr().err == f"{last}: this run has ended; nothing is trained.\n"


def test_a_checkpoint_that_does_not_say_is_not_compared(
    victim, make_data, make_trainer, every_epoch, tmp_path
):
    make_trainer(every_epoch, max_epochs=2).fit(victim(), make_data())
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["callbacks"]["ExactResume"]["made_of"]) == {"training images"}
    del checkpoint["callbacks"]["ExactResume"]
    torch.save(checkpoint, path)
    other = changed(make_data(), images=5)
    make_trainer(name="again", max_epochs=2).fit(victim(), other, ckpt_path=path)


class Foreign(LightningModule):
    """Of another package."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["image"].flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_modules_of_other_packages_go_on_too(make_data, make_trainer, every_epoch, tmp_path):
    make_trainer(every_epoch, max_epochs=2).fit(Foreign(), make_data())
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"
    with pytest.raises(ConfigError, match="training images"):
        make_trainer(max_epochs=2).fit(Foreign(), changed(make_data(), images=5), ckpt_path=path)


def test_each_step_of_each_epoch_on_each_device_draws_its_own():
    places = [(epoch, step, rank) for epoch in (0, 1) for step in (0, 1, 2) for rank in (0, 1)]

    def drawn(epoch, step, rank):
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        ExactResume().on_train_batch_start(trainer, None, None, step)
        return torch.rand(()).item()

    first = [drawn(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [drawn(*place) for place in places] == first
