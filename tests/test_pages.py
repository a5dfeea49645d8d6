"""The pages of the documentation: short lines, complete navigation, a page for every room."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NOT_API = {"commands", "configs"}  # used from the command line alone
GROUND = {"api", "errors", "files", "progress", "runs", "types"}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_are_at_most_100_characters(page):
    lines = page.read_text().splitlines()
    long = [line for line in lines if len(line) > 100 and not line.lstrip().startswith("|")]
    assert long == []


class Loader(yaml.SafeLoader):
    """Reads `mkdocs.yml`, whose tags name Python objects."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def leaves(entry):
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [leaf for child in children for leaf in leaves(child)]


def test_the_navigation_names_every_page_once():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # noqa: S506  (a SafeLoader)
    named = leaves(site["nav"])
    there = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    assert sorted(named) == there


def test_the_reference_has_a_page_for_every_room():
    rooms = {file.parent.name for file in (ROOT / "bdclean").glob("*/__init__.py")}
    rooms = rooms - NOT_API | GROUND
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")} - {"README"}
    assert pages == rooms
    index = (DOCS / "reference" / "README.md").read_text()
    for room in rooms:
        assert f"::: bdclean.{room}\n" in (DOCS / "reference" / f"{room}.md").read_text()
        assert f"]({room}.md)" in index


def test_what_a_room_offers_is_documented():
    """The reference lists `__all__`; a room without it must show its modules instead."""
    for page in sorted((DOCS / "reference").glob("[a-z]*.md")):
        init = ROOT / "bdclean" / page.stem / "__init__.py"
        if init.is_file() and "\n__all__ = [" not in init.read_text():
            assert "show_submodules: true" in page.read_text(), page


def test_pictures_are_well_formed():
    for picture in DOCS.rglob("*.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")  # noqa: S314  (ours)


CODE = {
    file.relative_to(ROOT).as_posix(): file.read_text()
    for folder in ("bdclean", "tests", "docs")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
THEIRS = {"bars.py", "dropped.py", "stripes.py", "eval_linear.py"}  # of readers and other projects


def holds(files, name):
    return any(re.search(rf"\b{name.split('.')[-1]}\b", CODE[file]) for file in files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_that_a_page_names_exists(page):
    """Files in backticks, names after a file (`a/b.py`: `name`), and `Class.name`."""
    text = page.read_text()
    wrong = []
    for path, names in re.findall(r"`([\w/]+\.py)`(?:: ((?:`\w[\w.]*`(?:, )?)+))?", text):
        files = [file for file in CODE if f"/{file}".endswith(f"/{path}")]
        if files:
            named = re.findall(r"[\w.]+", names)
            wrong += [f"{path}: {name}" for name in named if not holds(files, name)]
        elif path.split("/")[-1] not in THEIRS:
            wrong.append(path)
    for owner, name in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)`", text):
        files = [file for file, code in CODE.items() if re.search(rf"^class {owner}\b", code, re.M)]
        if files and not holds(files, name):
            wrong.append(f"{owner}.{name}")
    assert wrong == []
