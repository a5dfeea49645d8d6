"""The import graph of the package: rooms may only use the rooms below them."""

import ast
from pathlib import Path

import pytest

import bdclean

PACKAGE = Path(bdclean.__file__).parent
BOTTOM = {"types", "errors", "files", "progress"}
LOWER = BOTTOM | {"functional", "weights"}
MODELS = LOWER | {"attacks", "backbones", "metrics"}
OUTSIDE = {"callbacks", "figures", "reporting", "runs"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "shipped": {"errors"},
    "files": {"errors"},
    "progress": set(),
    "functional": BOTTOM,
    "weights": BOTTOM,
    "attacks": LOWER,
    "backbones": LOWER,
    "metrics": LOWER,
    "data": MODELS,
    "training": MODELS - {"attacks"},
    "purification": MODELS - {"attacks"},
    "figures": BOTTOM,
    "runs": BOTTOM | {"data"},
    "callbacks": MODELS | {"figures", "runs"},
    "reporting": MODELS | {"figures", "runs"},
    "commands": MODELS | {"data", "training", "purification"} | OUTSIDE | {"shipped"},
    "experiments": MODELS | {"data", "training", "purification", "commands", "shipped"} | OUTSIDE,
    "cli": MODELS
    | {"data", "training", "purification", "commands", "experiments", "shipped"}
    | OUTSIDE,
    "__main__": {"cli"},
}
EXCEPTIONS = {
    # learns a trigger together with the model
    "training/input_aware.py": {"attacks"},
}
METHODS = {"abl", "advrbd", "bcu", "cbd", "dbr", "scan"}


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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_method_imports_another_method(method):
    source = (PACKAGE / "purification" / f"{method}.py").read_text()
    others = METHODS - {method}
    assert not any(f"purification.{other}" in source for other in others)


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
