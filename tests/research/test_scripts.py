"""The scripts of docs/research: they import the package, and nothing imports them."""

import ast
from pathlib import Path

import pytest

import bdclean

RESEARCH = Path(__file__).parents[2] / "docs" / "research"
SCRIPTS = sorted(RESEARCH.glob("*/*.py"))
SIFT = ("sift_check", "sift_tiers")


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_package_imports_none_of_them():
    names = {script.stem for script in SCRIPTS}
    assert {
        "advrbd_score",
        "batch_norm",
        "bcu_causes",
        "check",
        "missed",
        "sift_check",
        "sift_tiers",
    } <= names
    for path in Path(bdclean.__file__).parent.rglob("*.py"):
        assert not imported(path) & names, path


def test_a_script_imports_scripts_of_its_own_question_alone():
    for script in SCRIPTS:
        others = {other.stem for other in SCRIPTS if other.parent != script.parent}
        assert not imported(script) & others, script


@pytest.mark.parametrize("folder", sorted({script.parent for script in SCRIPTS}), ids=str)
def test_page_and_script_lie_together(folder):
    page = (folder / "README.md").read_text()
    script = folder / f"{folder.name}.py"
    assert f"python docs/research/{folder.name}/{script.name} " in page
    assert f"({folder.name}/README.md)" in (RESEARCH / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["batch_norm", "bcu_causes", "check", "missed", "sift_check", "sift_tiers"]
)
def test_a_script_runs_as_its_page_says(name, begin):
    process = begin(RESEARCH / name / f"{name}.py", "--help")
    said, told = process.communicate()
    assert process.returncode == 0, told
    assert "usage: " in said
