"""The import graph of the package: rooms may only use the rooms below them."""

import ast
from pathlib import Path

import pytest

import bdclean

PACKAGE = Path(bdclean.__file__).parent
GROUND = {"types", "errors", "checks", "files", "markdown", "pictures", "printable", "progress"}
GROUND |= {"tabular", "extras"}
LOWER = GROUND | {"functional", "weights"}
MODELS = LOWER | {"metrics", "backbones"}
METHODS = MODELS | {"modules"}
ROOMS_OF_METHODS = ("purification", "sifting")
RUNS = METHODS | {"attacks", "data", "training", "checking", *ROOMS_OF_METHODS}
OUTSIDE = {
    *("callbacks", "figures", "locks", "plugins", "reporting", "runs", "shipped", "stopping"),
    "yaml_text",
}
ALLOWED = {
    "types": {"checks"},
    "errors": set(),
    "extras": {"errors"},
    "checks": {"errors"},
    "files": {"errors", "locks"},
    "markdown": {"printable"},
    "pictures": {"errors"},
    "printable": set(),
    "progress": set(),
    "tabular": {"errors", "printable"},
    "locks": {"errors"},
    "plugins": {"printable"},
    "stopping": set(),
    "shipped": {"errors"},
    "functional": GROUND,
    "weights": GROUND,
    "metrics": GROUND,
    "figures": GROUND,
    "attacks": LOWER,
    "backbones": LOWER,
    "data": LOWER | {"attacks", "backbones"},
    # what a defence stands on sees neither data nor attacks
    "modules": MODELS,
    "training": METHODS,
    **dict.fromkeys(ROOMS_OF_METHODS, METHODS),
    "checking": MODELS,
    "yaml_text": {"errors", "printable"},
    "runs": GROUND | {"data", "locks", "yaml_text"},
    "callbacks": METHODS | {"figures", "locks", "runs"},
    "reporting": GROUND | {"figures", "metrics", "runs"},
    "commands": RUNS | OUTSIDE,
    "api": RUNS | {"commands"},
    "cli": {"errors", "printable", "commands", "stopping"},
    "__main__": {"cli", "stopping"},
}
EXCEPTIONS = {
    # learns a trigger together with the model
    "training/input_aware.py": {"attacks"},
}
LOOPS = ("fit_loop", "epoch_loop", "batch_progress", "epoch_progress")


def rooms_imported(source: str) -> set[str]:
    """Second part of every `bdclean.X` import that runs (annotations are not a dependency)."""
    found = set()
    tree = ast.parse(source)
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add("relative import")
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "bdclean":
            names = [f"bdclean.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("bdclean.")}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_room_uses_only_the_rooms_below_it(path):
    inside = path.relative_to(PACKAGE)
    room = inside.parts[0].removesuffix(".py")
    if room == "__init__":
        return
    allowed = ALLOWED[room] | {room} | EXCEPTIONS.get(inside.as_posix(), set())
    assert rooms_imported(path.read_text()) <= allowed


def methods() -> list[Path]:
    """Files of rooms in which every file but those of the base is one method."""
    paths = [path for room in ROOMS_OF_METHODS for path in (PACKAGE / room).glob("*.py")]
    return sorted(path for path in paths if "def plan(self)" in path.read_text())


def test_methods_are_found():
    found = {path.stem for path in methods()}
    assert found >= {"abl", "advrbd", "bcu", "cbd", "dbr", "scan"}
    assert "base" not in found


@pytest.mark.parametrize("path", methods(), ids=lambda p: p.stem)
def test_no_method_imports_another_method(path):
    others = [other for other in methods() if other != path]
    assert others
    source = path.read_text()
    assert not any(f"{other.parent.name}.{other.stem}" in source for other in others)


def test_the_loops_of_lightning_are_touched_in_one_file():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in files()
        if any(name in path.read_text() for name in LOOPS)
    }
    # the callback of exact resume tells a loader where it stopped
    assert found <= {"modules/trainer.py", "callbacks/resume.py"}
    assert "modules/trainer.py" in found


def test_the_reader_of_imports_sees_every_form():
    assert rooms_imported("import bdclean.data.images") == {"data"}
    assert rooms_imported("from bdclean import data, attacks") == {"data", "attacks"}
    assert rooms_imported("def f():\n    from bdclean.data import x") == {"data"}


def test_sizes_of_files_and_functions():
    for path in files():
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}:{node.lineno}"
