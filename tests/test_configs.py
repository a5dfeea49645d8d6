"""Every config file parses in its place of the stack, and says one kind of thing."""

from itertools import product
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from bdclean.callbacks import SaveRunConfig
from bdclean.cli import LINKED, BdcleanCLI

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = ("trainer", "data", "attack", "arch", "train", "purify")


def files(kind):
    return sorted((CONFIGS / kind).glob("*.yaml"))


def keys(tree, prefix=""):
    """Dotted paths of the leaves; `class_path` and `init_args` are transparent."""
    if not isinstance(tree, dict) or not tree:
        return {prefix}
    found = set()
    for key, value in tree.items():
        part = "" if key in ("class_path", "init_args") else key
        found |= keys(value, ".".join(p for p in (prefix, part) if p))
    return found


def keys_of(kind):
    return set().union(*(keys(yaml.safe_load(f.read_text())) for f in files(kind)))


def parse(*stack):
    """Parses files without instantiating anything, as `--print_config` would."""
    parse_words(["fit", *(w for file in stack for w in ("-c", str(file)))])


def parse_words(words):
    """Parses a whole command."""

    class ParsingDoneError(Exception):
        pass

    class OnlyParse(BdcleanCLI):
        def before_instantiate_classes(self):
            raise ParsingDoneError

    try:
        with pytest.raises(ParsingDoneError):
            OnlyParse(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=SaveRunConfig,
                args=words,
            )
    except SystemExit as error:  # a parse error, already printed
        pytest.fail(f"{words} does not parse: {error}")


def test_no_key_stands_in_two_kinds_of_file():
    # train/ and purify/ are one kind, the method; arch/ is its overlay and may name the net.
    methods = keys_of("train") | keys_of("purify")
    kinds = {k: keys_of(k) for k in ("trainer", "data", "attack", "arch")} | {"method": methods}
    shared = {
        (a, b): kinds[a] & kinds[b] - {"data", "model"}
        for a, b in product(kinds, repeat=2)
        if a < b
    }
    assert {pair: both for pair, both in shared.items() if both} == {}


@pytest.mark.parametrize("file", [f for k in KINDS for f in files(k)], ids=lambda f: f.name)
def test_linked_facts_are_not_written(file):
    tree = yaml.safe_load(file.read_text()) or {}
    written = {k for k in keys(tree) if k.startswith("model.")}
    assert not written & {f"model.{fact}" for fact in LINKED}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", files("train") + files("purify"), ids=lambda f: f.name)
def test_methods_parse(method):
    digits = CONFIGS / "data/digits.yaml"
    parse(CONFIGS / "trainer/cpu.yaml", digits, CONFIGS / "attack/badnets/cbd.yaml", method)


# One method is enough: no key stands in two kinds of file, so none can depend on another's.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", files("data"), ids=lambda f: f.name)
def test_data_sets_parse(data):
    method = CONFIGS / "train/supervised.yaml"
    parse(CONFIGS / "trainer/cpu.yaml", data, CONFIGS / "attack/badnets/cbd.yaml", method)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", files("attack"), ids=lambda f: f.name)
def test_attacks_parse(attack):
    parse(
        CONFIGS / "trainer/cpu.yaml",
        CONFIGS / "data/digits.yaml",
        attack,
        CONFIGS / "train/supervised.yaml",
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", files("trainer"), ids=lambda f: f.name)
def test_trainers_and_architectures_parse(trainer):
    for arch in files("arch"):
        parse(trainer, CONFIGS / "data/digits.yaml", CONFIGS / "train/supervised/fast.yaml", arch)


LINES = (CONFIGS / "slurm/advrbd_runs.txt").read_text().splitlines()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("/")[-1])
def test_lists_of_runs_parse(line, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    parse_words(line.split())


def test_a_list_names_each_run_folder_once():
    assert len({line.split("--run ")[1] for line in LINES}) == len(LINES) == 11
