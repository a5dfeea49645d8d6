"""What lower rooms say of their arguments gets the key as users type it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from bdclean.commands.messages import dotted, parse_error, room_of
from bdclean.commands.trainer_settings import of_trainer
from bdclean.commands.type_words import either, in_words
from bdclean.errors import BdcleanError, ConfigError, behind

CONFIG = {
    "model.class_path": "bdclean.purification.CBD",
    "model.init_args.recipe.lr": -1.0,
    "model.init_args.seed": 3,
    "data.init_args.attack.init_args.rate": 1.5,
    "data.init_args.attack.init_args.seed": 3,
    "data.init_args.splits.val": -5,
    "model.init_args.weights": "old.pth",
    "model.init_args.mask.betas": (0.5, 2),
}


@pytest.mark.parametrize(
    ("said", "room", "shown"),
    [
        ("lr=-1.0: it must be 0 or above.", None, "--model.recipe.lr=-1.0: it must be 0 or above."),
        ("rate is 1.5; allowed is 1.", None, "--data.attack.rate=1.5; allowed is 1."),
        ("attack.rate=1.5: too much.", "model", "--data.attack.rate=1.5: too much."),
        ("seed=3: no.", "data.attack", "--data.attack.seed=3: no."),
        ("seed=3: no.", "model", "--model.seed=3: no."),
        ("seed=3: no.", None, "seed=3: no."),
        ("unit=4: no.", "data", "--data.unit=4: no."),
        ("unit is 4; no.", "data", "unit is 4; no."),
        ("data.init_args.splits.val is -5.", None, "--data.splits.val is -5."),
        ("There is no folder x=3.", "data", "There is no folder x=3."),
        ("Set data.init_args.root.", None, "Set --data.root."),
        ("old.pth: no such file.", "model", "--model.weights old.pth: no such file."),
        ("old.pth is a folder.", None, "--model.weights old.pth is a folder."),
        ("old.pth.bak: no.", None, "old.pth.bak: no."),
        ("model.weights is not set: no.", None, "--model.weights is not set: no."),
        ("data.attack: no.", None, "--data.attack: no."),
        ("Set model.recipe.lr anew.", None, "Set --model.recipe.lr anew."),
        ("--model.recipe: no.", None, "--model.recipe: no."),
        ("model.safetensors: no.", None, "model.safetensors: no."),
        ("runs/model.weights: no.", None, "runs/model.weights: no."),
        ("betas=[0.5, 2]: no.", None, "--model.mask.betas=[0.5, 2]: no."),
    ],
)
def test_a_bare_argument_gets_its_key(said, room, shown):
    assert dotted(said, CONFIG, room) == shown


def test_what_nobody_foresaw_is_told_in_one_line():
    assert parse_error('Parser key "a":\n  Odd\n   thing', []) == ('--a: Parser key "a": Odd thing')


def raised(*modules):
    """The trace of an error that passed through functions of these modules, outermost first."""
    trace = None
    for name in reversed(modules):
        frame = SimpleNamespace(f_globals={"__name__": name})
        trace = SimpleNamespace(tb_frame=frame, tb_next=trace)
    return trace


@pytest.mark.parametrize(
    ("modules", "room"),
    [
        (("jsonargparse._core", "bdclean.purification.cbd", "bdclean.functional.x"), "model"),
        (("bdclean.training.supervised", "bdclean.data.datamodule"), "data"),
        (("bdclean.data.datamodule", "bdclean.attacks.plan"), "data.attack"),
        (("bdclean.runs",), None),
        ((), None),
    ],
)
def test_the_innermost_room_is_where_the_class_stands(modules, room):
    assert room_of(raised(*modules)) == room


def test_the_error_behind_others_is_found():
    ours, theirs = ConfigError("ours"), ValueError("theirs")
    theirs.__cause__ = ours
    assert behind(theirs, BdcleanError) is ours
    assert behind(ours, BdcleanError) is ours
    assert behind(theirs, OSError) is None
    assert behind(None, OSError) is None


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("`devices` is odd. See https://x.", "--trainer.devices=x: `devices` is odd."),
        ("Something. With more", "trainer: Something."),
        ("No GPU found!", "trainer: No GPU found!"),
        ("`devices` are odd?", "--trainer.devices=x: `devices` are odd?"),
        (
            "fast_dev_run=True is odd\nmore",
            "--trainer.fast_dev_run=true: fast_dev_run=True is odd.",
        ),
        ("`Timer(duration='x')` is not valid.", "--trainer.max_time=x: it must be DD:HH:MM:SS."),
        (
            "Trainer(devices=0) of accelerator",
            "--trainer.devices=x: Trainer(devices=0) of accelerator.",
        ),
    ],
)
def test_what_lightning_says_of_its_trainer_gets_the_key(said, shown):
    settings = {"accelerator": "a", "devices": "x", "fast_dev_run": True, "max_time": "x"}
    assert of_trainer(said, settings) == shown


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number or null"),
        (tuple[float, float], "a list of 2 numbers"),
        (tuple[float, ...], "a list of numbers"),
        (list[int] | str, "a list of whole numbers or text"),
        (dict[str, int] | None, "a mapping or null"),
        (bool, "true or false"),
        (Literal["a", "b"] | None, "a, b or null"),
        (list[list[int]], "a list"),
        (Path | int, ""),
    ],
)
def test_annotations_are_told_in_words(hint, words):
    assert either(in_words(hint) or [""]) == words
