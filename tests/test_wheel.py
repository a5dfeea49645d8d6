"""What the wheel installs works from an empty folder: configs by name, commands of the pages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "configs/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
STACK = "-c trainer/cpu -c data/digits"  # what `...` leaves out, and all of $S but the attack
MANY = """
import contextlib, io, json, sys, warnings
from bdclean.cli import main
warnings.simplefilter("ignore")
said = []
for words in json.load(sys.stdin):
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    said.append((code, out.getvalue()))
print(json.dumps(said))
"""  # in one process, which imports torch once


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that a wheel, built from a copy of the sources, was installed into."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("bdclean", "configs", "docs"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(copy), str(copy)]
    subprocess.run([*pip, *wheel], check=True)
    (wheel,) = copy.glob("bdclean-*.whl")
    target = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *target], check=True)
    return site


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """Runs Python on the installed package, in a folder that was empty; returns what it prints."""
    place = tmp_path_factory.mktemp("empty")

    def python(*words, text=None):
        ended = subprocess.run(
            [sys.executable, *words],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(site)},
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    python.place = place
    return python


def commands(text):
    """The commands of a page that read configs, as words after `bdclean`."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines()]
    for line in lines:
        if line.startswith("bdclean ") and re.search(r" (-c|\$S) ?", line):
            whole = line.replace("...", STACK).replace("$S", f"{STACK} -c attack/badnets/cbd")
            words = shlex.split(whole.replace("ATTACK", "badnets"), comments=True)[1:]
            if not any(word.startswith("runs/") and word.endswith("config.yaml") for word in words):
                yield words


def test_the_package_is_whole(site):
    package = site / "bdclean"
    shipped = {path.relative_to(package / "configs") for path in package.glob("configs/**/*.yaml")}
    assert shipped == {
        path.relative_to(ROOT / "configs") for path in ROOT.glob("configs/**/*.yaml")
    }
    pages = {path.relative_to(package / "docs") for path in package.glob("docs/**/*.*")}
    written = {path.relative_to(ROOT / "docs") for path in ROOT.glob("docs/**/*.md")}
    assert pages == written | {Path("concepts.svg")}
    for pattern in ("**/*.py", "py.typed", "data/*.txt"):
        files = {path.relative_to(ROOT / "bdclean") for path in ROOT.glob(f"bdclean/{pattern}")}
        assert {path.relative_to(package) for path in package.glob(pattern)} >= files > set()


def test_the_configs_are_listed(run, site):
    where = run("-c", "import bdclean.shipped; print(bdclean.shipped.folder())")
    assert Path(where.strip()) == site / "bdclean" / "configs"
    listed = run("-m", "bdclean", "config", "ls").splitlines()
    assert len(listed) == len(list(ROOT.glob("configs/**/*.yaml")))


def test_help_names_pages_that_are_there(run, site):
    said = run("-c", "import bdclean.shipped; print(bdclean.shipped.page('docs/how_to/check.md'))")
    assert Path(said.strip()) == site / "bdclean/docs/how_to/check.md"


@pytest.mark.slow
def test_the_commands_of_the_pages_parse(run):
    for name in ("new_attack", "new_method", "data_sets"):
        page = (ROOT / f"docs/how_to/{name}.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        (file,) = set(re.findall(r"`(\w+\.py)`", page)) & {"stripes.py", "dropped.py", "bars.py"}
        (run.place / file).write_text(code)
    for attack, variant in (("label_consistent", "cbd"), ("input_aware", "official")):
        run("-m", "bdclean", "config", "cp", f"attack/{attack}/{variant}", f"{attack}.yaml")
    found = {tuple(words): page for page in PAGES for words in commands(page.read_text())}
    assert len(found) > 40
    said = json.loads(run("-c", MANY, text=json.dumps([[*w, "--print_config"] for w in found])))
    wrong = {
        f"{page.relative_to(ROOT)}: {shlex.join(words)}": text
        for (words, page), (code, text) in zip(found.items(), said, strict=True)
        if code != 0
    }
    assert wrong == {}


METHODS = [
    *("train/supervised/digits", "purify/cbd/digits", "measure/linear_probe"),
    *("purify/bcu/digits", "train/supervised"),
]


@pytest.mark.exhaustive
def test_getting_started_plants_a_backdoor_and_removes_it(run):
    """Its commands on the digits as they stand, and about the numbers of its records."""
    text = (ROOT / "docs/getting_started.md").read_text()
    chosen = [words for words in commands(text) if "data/digits" in words]
    assert [words[words.index("attack/badnets/digits") + 2] for words in chosen] == METHODS
    said = json.loads(run("-c", MANY, text=json.dumps(chosen)))
    assert [text for code, text in said if code != 0] == []
    assert not [text for _, text in said if "hardly learned" in text]
    records = [*run.place.glob("runs/*/result.json"), *run.place.glob("runs/*/test.json")]
    found = {path.parent.name: json.loads(path.read_text())["metrics"] for path in records}
    assert found.keys() == {"victim", "victim-probe", "cbd", "bcu", "victim-test"}
    assert {metrics["n_clean"] for metrics in found.values()} == {397}
    assert found["victim-test"] == found["victim"]
    for name in found.keys() - {"victim-test"}:
        file = ROOT / "docs/results/digits" / name.replace("-", "_") / "badnets-s0.json"
        shown = json.loads(file.read_text())["metrics"]
        measured = [found[name][key] for key in ("acc", "asr", "pa")]
        assert measured == pytest.approx([shown[key] for key in ("acc", "asr", "pa")], abs=5), name
        assert measured[1] > 90 if "victim" in name else measured[1] < 10
