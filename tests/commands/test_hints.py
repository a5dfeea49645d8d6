"""Which option or class a wrong word is nearest to."""

from pathlib import Path

import pytest

from bdclean.attacks import Attack
from bdclean.commands.hints import meant, meant_as, near_class, no_class
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
        ("splits.defense", known("data", Digits), "data.splits.defense"),
        ("splits", known("data", Digits), "data.splits"),
        ("pgd", OF_CBD, "model.pgd"),
        ("oot", ["out", "images"], "out"),
        ("outt", ["out", "images"], "out"),
        ("rum", FIT, "run"),
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
        ("Purifier", "model", "it is a base class, so that nothing can be made of it; choose BCU,"),
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


def test_a_class_lacks_methods(tmp_path, monkeypatch):
    (tmp_path / "lacking_attack.py").write_text(
        "from bdclean.attacks import Attack\nclass Mine(Attack):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = no_class("lacking_attack.Mine", [Attack])
    assert said == "nothing can be made of it, because its method is missing: make_trigger."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero."),
        ("import no_such_package", "No module named 'no_such_package'."),
    ],
)
def test_a_module_that_fails_is_no_missing_class(text, said, tmp_path, monkeypatch):
    (tmp_path / "failing_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    whole = f"its module failing_module cannot be imported. {said}"
    assert no_class("failing_module.Mine", [Attack]) == whole
    assert no_class("no_such_module.Mine", [Attack]).startswith("there is no such class.")


@pytest.mark.parametrize(
    ("name", "key", "near"),
    [
        ("SDG", "model.optimizer", "SGD"),
        ("x.EarlyStoping", "trainer.callbacks", "EarlyStopping"),
        ("WandbLoger", "trainer.logger", "WandbLogger"),
        ("SDG", "model.width", None),
        ("xyz", "model.optimizer", None),
        (None, "model.optimizer", None),
    ],
)
def test_classes_of_others_are_near_too(name, key, near):
    assert near_class(name, key) == near


def test_a_word_without_its_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("victim").mkdir()
    Path("victim/config.yaml").write_text("run: victim\nmodel:\n  class_path: bdclean.x\n")
    assert meant_as("victim", FIT) == " Did you mean --run victim?"
    assert meant_as("purify/cbd", FIT) == " Did you mean -c purify/cbd?"
    assert meant_as("last.ckpt", FIT) == " Did you mean --ckpt_path last.ckpt?"
    assert meant_as("album", FIT) == meant_as("a.yaml", ["kind"]) == ""


@pytest.mark.parametrize(
    ("name", "key", "found"),
    [
        ("cifar10", "data", "CIFAR10"),
        ("cifar_100", "data", "CIFAR100"),
        ("image_folder", "data", "ImageFolder"),
        ("gtsrb", "data", "GTSRB"),
        ("cbd", "model", "CBD"),
        ("linear-probe", "model", "LinearProbe"),
        ("Cdb", "model", "CBD"),
    ],
)
def test_classes_are_found_in_another_case(name, key, found):
    assert no_class(name, [base_of(key)], key).endswith(f" Did you mean {found}?")
