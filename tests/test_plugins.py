"""Classes of other packages, offered as entry points."""

import importlib
import os
import subprocess
import sys

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from bdclean.attacks import Attack
from bdclean.plugins import ATTACKS, METHODS, load_plugins

FACTS = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
PLUGIN = '''
from typing import Any

from bdclean.attacks import Blend


class PluginAttack(Blend):
    """Of another package.

    Args:
        depth: How deep.
    """

    def __init__(self, depth: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes packages with one module each, as an installer leaves them on the path.

    They stay imported, because their classes stay among the subclasses of `Attack`.
    """
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, code, points):
        (tmp_path / f"{name}.py").write_text(code)
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(FACTS.format(name=name))
        lines = [f"[{group}]\n{point}\n" for group, point in points]
        (facts / "entry_points.txt").write_text("".join(lines))
        importlib.invalidate_caches()

    return write


@pytest.fixture
def parser():
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--attack", type=Attack | None)
    return made


def test_an_attack_of_another_package_is_found_by_its_short_name(install, parser):
    install("bdclean_plugin", PLUGIN, [(ATTACKS, "PluginAttack = bdclean_plugin:PluginAttack")])
    words = ["--attack", "PluginAttack", "--attack.depth", "0.25", "--attack.rate", "0.2"]
    with pytest.raises(ArgumentError):
        parser.parse_args(words)
    assert load_plugins(ATTACKS)["PluginAttack"].__module__ == "bdclean_plugin"
    config = parser.parse_args(words)
    assert config.attack.class_path == "bdclean_plugin.PluginAttack"
    made = parser.instantiate(config).attack
    assert made.describe()["attack"] == "PluginAttack"
    assert (made.depth, made.rate, made.alpha) == (0.25, 0.2, 0.2)


@pytest.mark.parametrize(
    ("module", "code", "why"),
    [
        ("bdclean_needs", "import a_missing_package", "ModuleNotFoundError.*a_missing_package"),
        ("bdclean_raises", "raise OSError('no disk')", "OSError: no disk"),
        ("bdclean_empty", "", "AttributeError.*Broken"),
    ],
)
def test_one_that_fails_to_import_is_left_out_and_named(install, module, code, why):
    install(module, code, [(ATTACKS, f"Broken = {module}:Broken")])
    install("bdclean_whole", "class Whole: ...", [(ATTACKS, "Whole = bdclean_whole:Whole")])
    with pytest.warns(UserWarning, match=f"^Broken is left out: .*{module}:Broken.*{why}"):
        found = load_plugins(ATTACKS)
    assert "Broken" not in found
    assert found["Whole"].__name__ == "Whole"


def test_groups_are_apart(install):
    install("bdclean_other", "class Other: ...", [("bdclean.else", "Other = bdclean_other:Other")])
    assert "Other" not in load_plugins(ATTACKS)
    assert load_plugins("bdclean.else").keys() == {"Other"}


def test_what_is_no_class_or_ends_the_process_is_left_out(install):
    install("bdclean_exits", "import sys\nsys.exit(3)\n", [(ATTACKS, "Gone = bdclean_exits:Gone")])
    install("bdclean_number", "PI = 3.14\n", [(ATTACKS, "Pi = bdclean_number:PI")])
    with pytest.warns(UserWarning, match="is left out") as warned:
        found = load_plugins(ATTACKS)
    assert not {"Gone", "Pi"} & found.keys()
    said = " ".join(str(each.message) for each in warned)
    assert "Gone is left out" in said
    assert "3.14 is no class" in said


def test_a_broken_package_is_one_line_of_a_command(install, tmp_path):
    install("bdclean_torn", "raise OSError('a\\nb')\n", [(METHODS, "Torn = bdclean_torn:Torn")])
    done = subprocess.run(
        [sys.executable, "-m", "bdclean", "methods"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines() == [
        "bdclean: warning: Torn is left out: the entry point 'bdclean_torn:Torn' of "
        "bdclean.methods, of the package bdclean_torn 1.0, cannot be imported (OSError: a\\nb)."
    ]
