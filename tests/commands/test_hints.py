"""Which option or class a wrong word is nearest to."""

import pytest

from bdclean.attacks import Attack
from bdclean.commands.hints import meant, no_class
from bdclean.commands.rooms import arguments_of, base_of
from bdclean.data import Digits
from bdclean.purification import CBD
from bdclean.training import SimCLR, Supervised

FIT = ("run", "ckpt_path", "seed_everything", "trainer.max_epochs", "trainer.devices", "trainer.x")


def known(key, kind):
    return [f"{key}.{name}".replace(".init_args", "") for name in arguments_of(kind)]


OF_CBD, OF_SUPERVISED, OF_SIMCLR = (known("model", each) for each in (CBD, Supervised, SimCLR))


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("model.lr", OF_CBD, "model.recipe.lr"),
        ("model.lrr", OF_CBD, "model.recipe.lr"),
        ("model.epochs", OF_CBD, "model.recipe.epochs"),
        ("model.epsilon", OF_CBD, "model.pgd.epsilon"),
        ("model.epsilom", OF_CBD, "model.pgd.epsilon"),
        ("model.pgd.temperature", OF_CBD, "model.temperature"),
        ("model.learning_rate", OF_CBD, "model.recipe.lr"),
        ("model.lr", OF_SUPERVISED, "model.optimizer.lr"),
        ("model.recipe.lr", OF_SUPERVISED, "model.optimizer.lr"),
        ("model.recipe.epochs", OF_SUPERVISED, "trainer.max_epochs"),
        ("model.recipe.epochs", OF_SIMCLR, "trainer.max_epochs"),
        ("model.max_epochs", OF_CBD, "trainer.max_epochs"),
        ("model.recipe.batch_size", OF_SUPERVISED, "model.batch_size"),
        ("data.defense", known("data", Digits), "data.splits.defense"),
        ("lr", [*FIT, *OF_CBD], "model.recipe.lr"),
        ("epochs", [*FIT, *OF_CBD], "model.recipe.epochs"),
        ("epochs", FIT, "trainer.max_epochs"),
        ("max_epochs", [*FIT, *OF_CBD], "trainer.max_epochs"),
        ("batch_size", [*FIT, *OF_CBD], "model.recipe.batch_size"),
        ("batch_size", [*FIT, *OF_SUPERVISED], "model.batch_size"),
        ("dryrun", FIT, "trainer.fast_dev_run"),
        ("dryrun", ["run", "dry_run"], "dry_run"),
        ("seed", [*FIT, "data.splits.seed"], "seed_everything"),
        ("gpus", FIT, "trainer.devices"),
        ("weights", [*FIT, *OF_CBD], "model.weights"),
        ("output_dir", FIT, "run"),
        ("resume", FIT, "ckpt_path"),
    ],
)
def test_the_last_part_of_a_key_counts_first(name, options, option):
    assert meant(name, options) == f" Did you mean --{option}?"


@pytest.mark.parametrize(
    ("name", "options", "command"),
    [
        ("model.xyz", OF_CBD, "`bdclean fit --model.help CLASS`"),
        ("data.attack.xyz", ["data.attack.rate"], "`bdclean fit --data.attack.help CLASS`"),
        ("data.xyz", ["data.root"], "`bdclean fit --data.help CLASS`"),
        ("trainer.xyz", ["trainer.max_epochs"], "`bdclean fit --help_all`"),
        ("xyz", FIT, "The command's --help"),
        ("epochs", ["out", "clean"], "The command's --help"),  # of `figure tsne`
    ],
)
def test_nothing_is_proposed_that_is_far_off(name, options, command):
    assert meant(name, options) == f" {command} lists the options."


@pytest.mark.parametrize(
    ("name", "base", "said"),
    [
        ("Purifier", "model", "it is a base class, so that nothing can be made of it; choose BCU "),
        ("bdclean.purification.Purifier", "model", "it is a base class"),
        ("ImageDataModule", "data", "it is a base class, so that nothing can be made of it; choos"),
        ("Attack", "data.attack", "it is a base class, so that nothing can be made of it; choose "),
        ("BadNet", "data.attack", "there is no such class. Did you mean BadNets?"),
        ("Gone", "data", "there is no such class. Known are CIFAR10, CIFAR100, Digits, "),
        ("torch.nn.Linear", "model", "it is no LightningModule. Known are ABL, "),
    ],
)
def test_what_is_no_class_to_use_says_why(name, base, said):
    assert no_class(name, [base_of(base)]).startswith(said)
    assert base_of("data.attack") is Attack
