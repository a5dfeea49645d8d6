"""Every config file parses in its place of the stack, and says one kind of thing."""

import re
import tomllib
from itertools import product
from pathlib import Path

import pytest
import yaml

from bdclean.cli import main
from bdclean.commands.lightning import LINKED, BdcleanCLI
from bdclean.commands.rooms import import_rooms
from bdclean.errors import ConfigError
from bdclean.extras import EXTRAS
from bdclean.shipped import with_paths

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
METHODS = ("train", "purify", "sift", "measure", "bound")
KINDS = ("trainer", "data", "attack", "arch", *METHODS)


def files(*kinds):
    return [file for kind in kinds for file in sorted((CONFIGS / kind).rglob("*.yaml"))]


def name_of(file):
    return file.relative_to(CONFIGS).with_suffix("").as_posix()


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

    import_rooms()
    try:
        with pytest.raises(ParsingDoneError):
            OnlyParse(words[0], words[1:])
    except ConfigError as error:
        pytest.fail(f"{words} does not parse: {error}")


def test_every_file_is_of_a_kind_and_says_what_it_is():
    assert set(files(*KINDS)) == set(CONFIGS.rglob("*.yaml"))
    for file in files(*KINDS):
        first = file.read_text().partition("\n")[0]
        assert re.fullmatch(r"# .{10,98}\.", first), f"{name_of(file)}: {first}"


def test_the_page_names_every_file():
    page = (CONFIGS / "README.md").read_text()
    table = page.partition("| name | variants |\n|---|---|\n")[2].partition("\n\n")[0]
    named = set()
    for line in table.splitlines():
        name, variants = (re.findall(r"`([\w/]+)`", cell) for cell in line.split("|")[1:3])
        named |= {f"{name[0].rstrip('/')}/{variant}" for variant in variants}
        named |= {each for each in name if not each.endswith("/")}
    assert named == set(map(name_of, files(*KINDS)))


def test_all_packages_are_shipped_and_the_configs_with_them():
    """A new folder of the package must be named in pyproject.toml."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "bdclean").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(setuptools["packages"]) == packages | {"bdclean.configs", "bdclean.docs"}
    assert ROOT / setuptools["package-dir"]["bdclean.configs"] == CONFIGS


def test_packages_that_a_message_names_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"]
    assert {name: listed[name] for name in EXTRAS} == {k: list(v) for k, v in EXTRAS.items()}


def test_no_key_stands_in_two_kinds_of_file():
    # What trains, cleans or measures is one kind, the method; arch/ is its overlay and may name
    # the net.
    methods = set().union(*map(keys_of, METHODS))
    kinds = {k: keys_of(k) for k in ("trainer", "data", "attack", "arch")} | {"method": methods}
    shared = {
        (a, b): kinds[a] & kinds[b] - {"data", "model"}
        for a, b in product(kinds, repeat=2)
        if a < b
    }
    assert {pair: both for pair, both in shared.items() if both} == {}


@pytest.mark.parametrize("file", files(*KINDS), ids=name_of)
def test_linked_facts_are_not_written(file):
    tree = yaml.safe_load(file.read_text()) or {}
    written = {k for k in keys(tree) if k.startswith("model.")}
    assert not written & {f"model.{fact}" for fact in LINKED}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", files(*METHODS), ids=name_of)
def test_methods_parse(method):
    digits = CONFIGS / "data/digits.yaml"
    parse(CONFIGS / "trainer/cpu.yaml", digits, CONFIGS / "attack/badnets/cbd.yaml", method)


# One method is enough: no key stands in two kinds of file, so none can depend on another's.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", files("data"), ids=name_of)
def test_data_sets_parse(data):
    method = CONFIGS / "train/supervised.yaml"
    parse(CONFIGS / "trainer/cpu.yaml", data, CONFIGS / "attack/badnets/cbd.yaml", method)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", files("attack"), ids=name_of)
def test_attacks_parse(attack):
    parse(
        CONFIGS / "trainer/cpu.yaml",
        CONFIGS / "data/digits.yaml",
        attack,
        CONFIGS / "train/supervised.yaml",
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", files("trainer"), ids=name_of)
def test_trainers_and_architectures_parse(trainer):
    for arch in files("arch"):
        parse(trainer, CONFIGS / "data/digits.yaml", CONFIGS / "train/supervised/fast.yaml", arch)


LINES = (CONFIGS / "slurm/advrbd_runs.txt").read_text().splitlines()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("/")[-1])
def test_lists_of_runs_parse(line):
    parse_words(with_paths(line.split()))


def test_a_list_names_each_run_folder_once():
    assert len({line.split("--run ")[1] for line in LINES}) == len(LINES) == 11


@pytest.mark.parametrize("method", ["purify/bcu", "purify/cbd", "sift/advrbd", "train/simclr"])
def test_a_method_on_a_run_is_the_method_on_its_data(method, capsys, tmp_path):
    """`-c RUN/config.yaml -c METHOD`: nothing of the run's own training is left."""
    data = ["-c", "data/digits", "-c", "attack/badnets/digits", "--data.splits.val", "50"]
    training = ["-c", "train/supervised/digits", "--model.gamma", "0.3", "--model.width", "64"]
    limits = ["--trainer.max_steps", "7", "--trainer.gradient_clip_val", "0.5"]
    shown = []
    for words in ([*data, *training, *limits], ["-c", str(tmp_path / "config.yaml")], data):
        new = [] if words[-1] == "0.5" else ["-c", method]
        with pytest.raises(SystemExit) as ended:
            main(["fit", *words, *new, "--print_config"])
        assert ended.value.code == 0
        shown.append(yaml.safe_load(capsys.readouterr().out))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(shown[0]))
    for config in shown[1:]:
        for network in ("arch", "width", "stem"):
            config["model"]["init_args"].pop(network, None)
    assert shown[1] == shown[2]
