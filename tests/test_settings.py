"""Every setting of every class: numbers that are none, and values of a wrong kind."""

import inspect
import math
import re
from collections import abc
from dataclasses import is_dataclass
from functools import cache
from typing import get_args, get_origin

import pytest
from lightning import LightningDataModule, LightningModule

from bdclean.attacks import Attack
from bdclean.commands.messages import dotted
from bdclean.commands.parsing import Parser
from bdclean.commands.rooms import classes_of, hints_of, import_rooms
from bdclean.errors import BdcleanError, ConfigError
from bdclean.types import ImageFacts

import_rooms()
FACTS = ImageFacts(10, 32, (0.5,) * 3, (0.25,) * 3)
BASES = {"model": LightningModule, "data": LightningDataModule, "data.attack": Attack}
CLASSES = [
    (key, kind)
    for key, base in BASES.items()
    for kind in classes_of(base).values()
    if kind.__module__.startswith("bdclean.")
]


def groups_in(hint):
    return [each for each in (hint, *get_args(hint)) if is_dataclass(each)]


@cache
def own(kind):
    """The annotations of the arguments of a class, its groups among them, by name."""
    found = {name: hint for name, hint in hints_of(kind).items() if hint and "." not in name}
    return {name: hint for name, hint in found.items() if hint is not ImageFacts}


def with_groups(kind):
    """A class and the groups below it."""
    yield kind
    for hint in own(kind).values():
        for group in groups_in(hint):
            yield from with_groups(group)


# ---------------------------------------------------------------------- numbers

NAN, INF = math.nan, math.inf
ZERO = {
    **dict.fromkeys(
        ("lr", "momentum", "weight_decay", "betas", "gamma", "warmup_epochs"),
        "an optimizer may stand still, or go without",
    ),
    "milestones": "the rate falls at the start",
    **dict.fromkeys(
        (
            "rest_weight",
            "beta",
            "lambda_div",
            "lambda_norm",
            "label_smoothing",
            "level",
            "mask_density",
        ),
        "a term of the loss may be left out",
    ),
    **dict.fromkeys(
        ("alpha", "alphas", "alpha_train", "alpha_test", "strength", "epsilon", "cover_rate"),
        "a trigger or a change that is not there is a comparison",
    ),
    **dict.fromkeys(("mask_rate", "cross_ratio", "degrees", "translate"), "nothing is changed"),
    "ratios": "a block may be kept",
    "mean": "images may be black",
    **dict.fromkeys(("of_all", "radius", "defense", "probe", "val", "views"), "none"),
    **dict.fromkeys(
        ("seed", "image_seed", "pattern_seed", "grid_seed", "reinit_seed", "shuffle_seed"),
        "a seed",
    ),
    **dict.fromkeys(("target", "source_class", "single_group", "cover_classes"), "the first one"),
}
"""Settings that may be 0, and why."""
LENGTHS = {"ratios": 10, "alphas": 4}


def parts_of(hint):
    yield hint
    for part in get_args(hint):
        yield from parts_of(part)


def numbers():
    owners = {owner: key for key, kind in CLASSES for owner in with_groups(kind)}
    for owner, key in sorted(owners.items(), key=lambda item: item[0].__name__):
        for name, hint in own(owner).items():
            parts = list(parts_of(hint))
            if not {int, float} & {part for part in parts if isinstance(part, type)}:
                continue
            many = any(get_origin(part) in (tuple, list, abc.Sequence) for part in parts)
            length = LENGTHS.get(name, max(2, parts.count(float))) if many else 0
            for value in (NAN, INF, -INF, -1, 0) if float in parts else (-1, 0):
                yield pytest.param(
                    key, owner, name, length, value, id=f"{owner.__name__}.{name}={value}"
                )


def test_the_walk_finds_the_numbers_of_groups_and_of_classes():
    found = {param.id.partition("=")[0] for param in numbers()}
    assert len(found) > 90
    assert found >= {
        "Recipe.lr",
        "PGD.epsilon",
        "Probe.c",
        "Projection.dim",
        "Rounds.count",
        "PatchScore.num_masks",
        "GeneratorRecipe.betas",
        "Splits.val",
        "View.batch_size",
        "CBD.temperature",
        "CBD.lambda_pull",
        "BCU.ratios",
        "WaNet.strength",
        "TaCT.cover_classes",
        "ImageFolder.std",
        "Imagenette.input_size",
    }


@pytest.mark.parametrize(("key", "owner", "name", "length", "value"), list(numbers()))
def test_a_number_that_cannot_be_is_refused_by_name(key, owner, name, length, value, tmp_path):
    given = {name: [value] * length if length else value}
    parameters = inspect.signature(owner).parameters
    if "facts" in parameters:
        given["facts"] = FACTS
    if owner.__name__ == "PGD":
        given = {"epsilon": 8.0, "steps": 1} | given
    if owner.__name__ == "ImageFolder":
        for label in "ab":
            (tmp_path / "train" / label).mkdir(parents=True)
            (tmp_path / "train" / label / "0.png").touch()
        given["root"] = str(tmp_path)
    if "width" in parameters and name != "width":
        given["width"] = 4
    try:
        owner(**given)
    except BdcleanError as error:
        told = str(error)
    else:
        assert value == 0
        assert ZERO[name]
        return
    assert re.search(rf"\b{name}\b", told)
    assert "\n" not in told
    assert told.endswith(".")
    if told.startswith(f"{name}=") and not length:
        shown = dotted(told, {f"{key}.init_args.{name}": value}, key)
        assert shown.startswith(f"--{key}.{name}={value}")


# ---------------------------------------------------------------------- values of a wrong kind

INNER_WORDS = ("Parser key", "Subtypes", "class '", "Expected", "NestedArg", "Namespace", "typing")


def paths(kind):
    """Dotted names of all arguments, those of groups among them, with their annotations."""
    for name, hint in own(kind).items():
        yield name, hint
        for group in groups_in(hint):
            yield from ((f"{name}.{inner}", each) for inner, each in paths(group))


def annotations():
    """One setting of each annotation."""
    seen = {}
    for key, kind in CLASSES:
        for path, hint in paths(kind):
            if str in (hint, *get_args(hint)):
                continue  # anything may be text
            seen.setdefault(
                (key, str(hint)), pytest.param(key, kind, path, hint, id=f"{kind.__name__}.{path}")
            )
    return list(seen.values())


@pytest.fixture(scope="module")
def parser():
    made = Parser()
    made.add_argument("--model", type=LightningModule)
    made.add_argument("--data", type=LightningDataModule)
    return made


def chosen(key, kind):
    """The words that choose a class."""
    start = [f"--{key}", kind.__name__]
    if key == "model":
        facts = "num_classes: 10, input_size: 32, mean: [0, 0, 0], std: [1, 1, 1]"
        start.append(f"--model.facts={{{facts}}}")
    return ["--data", "Digits", *start] if key == "data.attack" else start


@pytest.mark.parametrize(("key", "kind", "path", "hint"), annotations())
def test_a_value_of_a_wrong_kind_is_told_in_words(key, kind, path, hint, parser):
    start = chosen(key, kind)
    wrong = ["[[1, {b: 2}]]", "{a: [1]}"]
    wrong += [] if type(None) in get_args(hint) else ["null"]
    for value in wrong:
        with pytest.raises(ConfigError) as told:
            parser.parse_args([*start, f"--{key}.{path}={value}"])
        said = str(told.value)
        assert said.startswith(f"--{key}.{path}"), value
        assert "\n" not in said
        assert said.endswith((".", "?")), value
        assert not [word for word in INNER_WORDS if word in said], said
        assert len(said) < 300


GROUPS = [
    pytest.param(key, kind, path, hint, id=f"{kind.__name__}.{path}")
    for key, kind in CLASSES
    for path, hint in paths(kind)
    if groups_in(hint)
]


@pytest.mark.parametrize(("key", "kind", "path", "hint"), GROUPS)
def test_a_group_takes_no_value_of_its_own(key, kind, path, hint, parser):
    may_be_null = type(None) in get_args(hint)
    for value in ("null", "[]", "[1]", "3", "0.5", "text", "true"):
        if may_be_null and value == "null":
            continue
        with pytest.raises(ConfigError) as told:
            parser.parse_args([*chosen(key, kind), f"--{key}.{path}={value}"])
        name = f"--{key}.{path}"
        rule = f"it must be null, or set as {name}.NAME VALUE."
        if not may_be_null:
            rule = f"set its options one by one, as {name}.NAME VALUE."
        assert str(told.value) == f"{name}={value}: {rule}"
