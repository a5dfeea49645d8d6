"""What all attacks share: forwarded arguments, their record, and the names of further tests."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from bdclean.attacks import AdaptiveBlend, Attack, BadNets, Blend, InputAware, LabelConsistent, TaCT

ROOT = Path(__file__).parents[2]
SHARED = ["target", "rate", "rate_base", "label_rule", "exclude_target", "seed", "quantize"]
FIXED = {  # by the attack; not an argument of it
    "TaCT": {"label_rule", "exclude_target"},
    "AdaptiveBlend": {"label_rule"},
    "AdaptivePatch": {"label_rule"},
}
# Where they differ from those of the base: 0, 0.1, dataset, all_to_one.
DEFAULTS = {
    "SIG": {"rate": 0.8, "rate_base": "target_class", "label_rule": "clean_label"},
    "LabelConsistent": {"rate": 0.6, "rate_base": "target_class", "label_rule": "clean_label"},
    "PhysicalBA": {"rate": 0.05},
    "TaCT": {"target": 1, "rate": 0.05},
    "AdaptiveBlend": {"target": 1, "rate": 0.05},
    "AdaptivePatch": {"target": 1, "rate": 0.05},
}


class Data:
    """Takes an attack as the data modules do.

    Args:
        attack: Any.
    """

    def __init__(self, attack: Attack | None = None) -> None:
        self.attack = attack


@pytest.fixture
def name(attack_type):
    return attack_type.__name__


@pytest.fixture
def parser():
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Data, "data")
    return made


# ---------------------------------------------------------------------- arguments


def test_the_arguments_of_the_base_are_known_with_the_defaults_of_the_attack(parser, name):
    config = parser.parse_args(["--data.attack", name])
    found = vars(config.data.attack.init_args)
    assert found.keys() >= set(SHARED) - FIXED.get(name, set())
    assert not found.keys() & (FIXED.get(name, set()) | {"kwargs"})
    usual = {
        **{"target": 0, "rate": 0.1, "rate_base": "dataset", "label_rule": "all_to_one"},
        **{"exclude_target": False, "seed": 0, "quantize": "round"},
    }
    wanted = usual | DEFAULTS.get(name, {})
    assert {key: found[key] for key in SHARED if key in found} == {
        key: wanted[key] for key in SHARED if key in found
    }
    made = parser.instantiate(config).data.attack
    assert all(getattr(made, key) == value for key, value in wanted.items())


def test_a_value_of_another_type_is_refused_by_its_key(parser, name):
    with pytest.raises(ArgumentError, match=r"(?s)\"rate\":.*float.*many"):
        parser.parse_args(["--data.attack", name, "--data.attack.rate", "many"])


def test_a_misspelt_argument_is_refused_by_name(parser, name, attack_type):
    with pytest.raises(ArgumentError, match="'rtae' is not accepted"):
        parser.parse_args(["--data.attack", name, "--data.attack.rtae", "0.2"])
    with pytest.raises(TypeError, match="rtae"):
        attack_type(rtae=0.2)
    with pytest.raises(TypeError, match="positional"):
        attack_type(0.2)  # of which argument?


@pytest.mark.parametrize(
    ("name", "key"), [(n, k) for n, keys in FIXED.items() for k in sorted(keys)]
)
def test_what_an_attack_has_fixed_is_no_argument(parser, name, key):
    with pytest.raises(ArgumentError, match=f"'{key}' is not accepted"):
        parser.parse_args(["--data.attack", name, f"--data.attack.{key}", "all_to_one"])


def test_help_describes_every_argument(parser, name, capsys):
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--data.attack.help", name])
    text = capsys.readouterr().out
    options = text.split("  --data.attack.")[1:]
    described = {part.split()[0]: part.split("\n", 1)[-1] for part in options}
    assert set(SHARED) - FIXED.get(name, set()) <= described.keys()
    for key, part in described.items():
        words = " ".join(part.split()).partition("(type:")[0]
        assert len(words) > 8, f"{key} has no description"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's `skip_none`
def test_a_saved_config_holds_every_value_and_runs_again(parser, name):
    config = parser.parse_args(["--data.attack", name, "--data.attack.seed", "7"])
    text = parser.dump(config, skip_none=False)  # as the saved config of a run
    saved = yaml.safe_load(text)["data"]["attack"]
    assert saved["class_path"] == f"bdclean.attacks.{name}"
    assert saved["init_args"].keys() == vars(config.data.attack.init_args).keys()
    again = parser.parse_string(text)
    assert parser.dump(again, skip_none=False) == text
    first, second = (parser.instantiate(each).data.attack for each in (config, again))
    assert first.describe() == second.describe()
    assert first.seed == 7


# ---------------------------------------------------------------------- the record


def test_all_arguments_are_recorded_as_json(any_attack):
    facts = any_attack.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert list(facts)[:8] == ["attack", *SHARED]
    parser = ArgumentParser()
    parser.add_class_arguments(type(any_attack))
    own = set(vars(parser.get_defaults())) - {"surrogate"}
    assert facts.keys() == {"attack", *SHARED} | own


def test_the_record_names_files_without_their_folders(tmp_path):
    assert Blend(image=f"file:{tmp_path}/own.png").describe()["image"] == "file:own.png"
    assert InputAware(trigger="runs/iab/t.safetensors").describe()["trigger"] == "t.safetensors"
    assert "surrogate" not in LabelConsistent(surrogate="net.safetensors").describe()


class Other(BadNets):
    """Keeps arguments of many kinds, and one not at all."""

    def __init__(self, file="/home/me/own.txt", kind=torch.uint8, pair=(1, None), lost=3, **kwargs):
        super().__init__(**kwargs)
        self.file, self.kind, self.pair = file, kind, pair


def test_an_attack_of_a_user_records_what_it_keeps():
    facts = Other(target=2, seed=4).describe()
    own = {"file": "own.txt", "kind": "torch.uint8", "pair": [1, None]}
    assert facts == BadNets(target=2, seed=4).describe() | {"attack": "Other"} | own


def test_special_values_of_the_record():
    assert BadNets(label_rule="all_to_all", target=3).describe()["target"] is None
    assert LabelConsistent().describe()["position"] == "top_left"
    assert LabelConsistent(patch="corners4").describe()["position"] is None
    assert TaCT(cover_classes=(5, 7)).describe()["cover_classes"] == [5, 7]
    assert AdaptiveBlend().describe()["label_rule"] == "all_to_one"


# ---------------------------------------------------------------------- further tests


def test_further_tests_have_the_names_that_the_class_says(any_attack):
    labels = torch.arange(20) % 10
    images = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    tests = any_attack.further_tests(images, labels, any_attack.make_trigger((16, 16)))
    assert tuple(tests) == any_attack.further == type(any_attack).further


# ---------------------------------------------------------------------- what belongs to an attack


def test_every_attack_has_a_config_and_a_page(name, attack_type):
    configs = (ROOT / "configs" / "attack").rglob("*.yaml")
    assert any(f"class_path: bdclean.attacks.{name}\n" in path.read_text() for path in configs)
    file = attack_type.__module__.rpartition(".")[2]
    assert (ROOT / "docs" / "attacks" / f"{file}.md").is_file()
    assert f"]({file}.md)" in (ROOT / "docs" / "attacks" / "README.md").read_text()
