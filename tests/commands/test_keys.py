"""Options that messages name can be typed: they are compared with those that the classes take."""

import ast
import inspect
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from lightning import Trainer

import bdclean
from bdclean.backbones import ModelInfo
from bdclean.backbones.architectures import option_of
from bdclean.commands.class_help import options_of
from bdclean.commands.messages import dotted
from bdclean.commands.model_options import KEYS
from bdclean.commands.rooms import base_of, classes_of, import_rooms
from bdclean.commands.short_options import shortened

PACKAGE = Path(bdclean.__file__).parent
METHODS = ("purification", "sifting", "training")
# `of CBD: --model.probe` names the class that takes an option.
NAMED = re.compile(r"(?:of (\w+): )?--((?:model|data|trainer)(?:\.[a-z_]\w*)+)(?!\w*\{)")
# Of each class, but no arguments of it.
SYNTAX = re.compile(r".*\.(help|class_path|init_args\.\w+)")
# Options that only some classes take, in files that speak of all: why nobody is misled.
KNOWN = {
    ("backbones/apart.py", "data.input_size"): "asks whether it is right",
    ("backbones/build.py", "data.input_size"): "where it can be set",
    ("commands/closing.py", "model.weights"): "of the next method, which reads one",
    ("commands/hints.py", "model.weights"): "the user has typed a weights file",
    ("commands/purify.py", "data.root"): "the user has typed it",
    ("commands/purify.py", "model.recipe.epochs"): "of all purifiers",
    ("commands/purify.py", "model.weights"): "the user has typed it",
    ("commands/purify_report.py", "model.recipe.epochs"): "of all purifiers",
    ("commands/run_place.py", "model.weights"): "the user has given a weights file",
    ("commands/sift.py", "data.allow_flip"): "of the folders that it reads",
    ("commands/sift.py", "data.root"): "the user has typed it",
    ("commands/sift.py", "model.until"): "the user has typed it",
    ("commands/words.py", "model.weights"): "the user has typed it",
    ("data/decoding.py", "data.cache"): "of all data sets that decode files",
    ("data/folder.py", "data.num_classes"): "of the folders that it reads",
    ("modules/base.py", "model.weights"): "where the module has it",
    ("modules/checkpoints.py", "model.weights"): "where a method takes one",
    ("modules/training.py", "model.weights"): "of all trainings, which this is the base of",
    ("purification/base.py", "model.probe"): "where the method has it",
    ("shipped.py", "model.weights"): "the user has typed a weights file",
    ("training/input_aware.py", "data.input_size"): "other sizes are those that it has set",
}


@pytest.fixture(scope="module", autouse=True)
def _rooms():
    import_rooms()


def texts(file):
    """The texts in a module, without docstrings, and with `{` where a value stands."""
    tree = ast.parse(file.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            yield "".join(p.value if isinstance(p, ast.Constant) else "{" for p in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


@cache
def options(kind, room):
    """Dotted names of the options of a class, those of groups that may be null as well."""
    if room == "trainer":
        return {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    told = "\n".join(options_of(kind, room, {}, whole=True))
    return set(re.findall(r"^  --([\w.]+)", told, re.MULTILINE))


def takers(file, room, named):
    """The classes that all take what a file names: one, those in it, or all there are."""
    if room == "trainer":
        return [Trainer]
    classes = classes_of(base_of(room))
    if named:
        return [classes[named]]
    if file.parent.name in METHODS and room == "model":
        module = import_module(f"bdclean.{file.parent.name}.{file.stem}")
        own = [each for each in classes.values() if each.__module__ == module.__name__]
        bases = [each for each in vars(module).values() if inspect.isclass(each)]
        bases = tuple(each for each in bases if each.__module__ == module.__name__)
        return own or [each for each in classes.values() if issubclass(each, bases)]
    return list(classes.values())


def unknown(file, text):
    """Options in a text of a file that are none, each with a class that does not take it."""
    for named, key in NAMED.findall(text):
        if SYNTAX.fullmatch(key):
            continue
        room = "data.attack" if key.startswith("data.attack.") else key.partition(".")[0]
        for kind in takers(file, room, named):
            if not any(f"{each}.".startswith(f"{key}.") for each in options(kind, room)):
                yield key, kind.__name__
                break


def test_every_option_in_a_message_is_one_of_all_classes_that_it_may_be_about():
    wrong = {
        (file.relative_to(PACKAGE).as_posix(), key): lacks
        for file in PACKAGE.rglob("*.py")
        for text in texts(file)
        for key, lacks in unknown(file, text)
    }
    assert {place: lacks for place, lacks in wrong.items() if place not in KNOWN} == {}
    assert [place for place in KNOWN if place not in wrong] == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("data/loading.py", "Lower --model.batch_size.", ["model.batch_size"]),
        ("data/loading.py", "Lower it (of SimCLR: --model.batch_size).", []),
        ("data/loading.py", "Lower it (of CBD: --model.batch_size).", ["model.batch_size"]),
        ("purification/bcu.py", "Raise --model.probe.c.", ["model.probe.c"]),
        ("purification/cbd.py", "Raise --model.probe.c.", []),
        ("purification/base.py", "Raise --model.recipe.lr, not --model.lr.", ["model.lr"]),
        ("data/loading.py", "--data.attack.rte 3", ["data.attack.rte"]),
        ("runs.py", "--trainer.max_epoch 3, --trainer.devices 1", ["trainer.max_epoch"]),
    ],
)
def test_an_option_that_cannot_be_typed_is_found(file, text, found):
    assert [key for key, _ in unknown(PACKAGE / file, text)] == found


def test_facts_of_a_model_are_options_of_a_fit_and_of_the_short_commands():
    purifier = classes_of(base_of("model"))["BCU"]
    folder = classes_of(base_of("data"))["ImageFolder"]
    known = options(purifier, "model") | options(folder, "data")
    names = {field.name for field in fields(ModelInfo)} - {"num_classes", "head"}
    assert names == set(KEYS)
    for name in names:
        assert option_of(name).removeprefix("--") in known
        assert shortened(option_of(name)) == f"--{name}"


BATCHES = {
    "model.init_args.recipe.batch_size": 128,
    "data.init_args.view.batch_size": 128,
    "data.init_args.eval_batch_size": 500,
}


@pytest.mark.parametrize(
    ("said", "more", "shown"),
    [
        ("batch_size=128: no.", {}, "--model.recipe.batch_size=128: no."),
        ("batch_size=1: no.", {}, "batch_size=1: no."),
        ("batch_size=128: no.", {"model.probe.recipe.batch_size": 128}, "batch_size=128: no."),
    ],
)
@pytest.mark.parametrize("room", ["model", "data"])
def test_no_option_is_made_up_where_the_value_tells_none(room, said, more, shown):
    assert dotted(said, BATCHES | more, room) == shown
