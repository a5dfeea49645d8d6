"""No file of the current folder runs, but for modules that a class path names."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from PIL import Image

from bdclean.backbones import ModelInfo
from bdclean.backbones.own_network import _NETWORKS
from bdclean.cli import main
from bdclean.commands.own_modules import _FINDER, allow
from bdclean.weights import write

STRAY = ("tabulate", "torch_xla", "yaml", "numpy", "csv", "email", "json", "random", "matplotlib")
FIT = (
    *("-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"),
    *("-c", "train/supervised/fast", "--model.width", "4", "--trainer.max_epochs", "1"),
)
MODULE = "from bdclean.training import Supervised\nclass Own(Supervised):\n    '''Mine.'''\n"


@pytest.fixture
def place(tmp_path):
    for name in STRAY:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    return tmp_path


def in_a_process(place, *words, **variables):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], ["methods"], ["fit", *FIT], ["fit", "--model", "yaml.Loader"]],
    ids=lambda words: " ".join(words[:2]),
)
def test_stray_files_do_not_run(place, words):
    status, said = in_a_process(place, "-m", "bdclean", *words)
    assert status == (2 if words[-1] == "yaml.Loader" else 0), said
    assert not (place / "canary").exists()


def test_the_installed_command_runs_none_either(place):
    code = "import sys; from bdclean.cli import main; main(sys.argv[1:])"
    assert in_a_process(place, "-P", "-c", code, "methods")[0] == 0
    assert not (place / "canary").exists()


@pytest.mark.parametrize("config", [False, True])
def test_a_module_that_is_named_is_found(place, config):
    (place / "mine.py").write_text(MODULE)
    (place / "mine.yaml").write_text("model: {class_path: mine.Own}\n")
    named = ["-c", "mine.yaml"] if config else ["--model.help", "mine.Own"]
    status, said = in_a_process(place, "-m", "bdclean", "fit", *named, "--help")
    assert status == 0, said
    assert "Mine." in said
    assert not (place / "canary").exists()


BROKEN = {
    "no Python": ("def (\n", "SyntaxError: invalid syntax (broken.py, line 1)."),
    "a package that is missing": (
        "import sys\nimport no_such_package\n",
        "ModuleNotFoundError in line 2: No module named 'no_such_package'.",
    ),
    "a name that is missing": (
        "from json import nope\n",
        "ImportError in line 1: cannot import name 'nope' from 'json' (",
    ),
    "an attribute": (
        "import json\njson.nope\n",
        "AttributeError in line 2: module 'json' has no attribute 'nope'.",
    ),
    "an error": ("raise ValueError('no', 3)\n", "ValueError in line 1: ('no', 3)."),
    "a mark": ("raise RuntimeError('Not found!')\n", "RuntimeError in line 1: Not found!"),
    "nothing to say": ("raise KeyError\n", "KeyError in line 1."),
    "many lines": ("raise RuntimeError('a\\nb.')\n", "RuntimeError in line 1: a b."),
    "an end": ("import sys\nsys.exit(3)\n", "SystemExit in line 2: 3."),
    "itself": ("import broken.x\n", "ModuleNotFoundError in line 1: No module named 'broken.x'; "),
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("names", "modules", "own"):
        monkeypatch.setattr(_FINDER, name, set())
    monkeypatch.setenv("BDCLEAN_OWN_MODULES", "")
    yield tmp_path
    for name in [each for each in sys.modules if each.split(".")[0] == "broken"]:
        del sys.modules[name]


def test_a_config_in_another_folder_names_a_module_of_this_one(broken, capsys):
    (broken / "broken.py").write_text(MODULE)
    (broken / "sub").mkdir()
    (broken / "sub" / "mine.yaml").write_text("model: {class_path: broken.Own}\n")
    words = ("fit", "-c", "data/digits", "-c", "sub/mine.yaml", "--print_config")
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "class_path: broken.Own" in capsys.readouterr().out


def test_the_help_of_a_class_of_ones_own_prints_the_name_that_works(broken, capsys):
    (broken / "broken.py").write_text(MODULE)
    main(["fit", "--model.help", "broken.Own"])
    said = capsys.readouterr().out
    assert said.startswith("usage: bdclean fit --model broken.Own [--model.KEY VALUE ...]\n")


def told(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("bdclean: ")


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize(
    "words",
    [
        ["--model", "broken.Own"],
        ["-c", "mine.yaml"],
        ["--data.attack", "broken.Own"],
        ["--model.optimizer", "broken.Own"],
        ["--trainer.logger", "broken.Own"],
        ["--trainer.callbacks", "[{class_path: broken.Own}]"],
        ["--model.help", "broken.Own"],
        ["--model", "broken.Own", "--help"],
    ],
    ids=" ".join,
)
def test_what_the_import_of_a_module_raises_is_told(case, words, broken, capsys):
    text, raised = BROKEN[case]
    (broken / "broken.py").write_text(text)
    (broken / "mine.yaml").write_text("model: {class_path: broken.Own}\n")
    said = told(["fit", *FIT, *words], capsys)
    begins = "The module broken was found (broken.py), but its import raised "
    assert said.startswith(f"{begins}{raised}")


def test_a_module_of_a_package_is_told_of_too(broken, capsys):
    (broken / "broken").mkdir()
    (broken / "broken" / "__init__.py").touch()
    (broken / "broken" / "deep.py").write_text("1 / 0\n")
    said = told(["fit", *FIT, "--model", "broken.deep.Own"], capsys)
    assert said == (
        "The module broken.deep was found (deep.py), but its import raised ZeroDivisionError in "
        "line 1: division by zero.\n"
    )


def test_what_a_module_expects_to_fail_is_not_told(broken, capsys):
    (broken / "broken").mkdir()
    (broken / "broken" / "__init__.py").write_text(
        "try:\n    from broken import fast\nexcept ImportError:\n    fast = None\n"
    )
    (broken / "broken" / "fast.py").write_text("import no_such_package\n")
    said = told(["fit", *FIT, "--model", "broken.Own"], capsys)
    assert said.startswith("--model=broken.Own: there is no such class. Known are ABL, ")


def test_a_class_that_its_module_does_not_have_is_missed(broken, capsys):
    (broken / "broken.py").write_text(MODULE)
    said = told(["fit", *FIT, "--model", "broken.Owm"], capsys)
    assert said.startswith("--model=broken.Owm: there is no such class.")


def test_an_installed_module_comes_first(broken):
    (broken / "json.py").write_text("1 / 0\n")
    (broken / "tomllib.py").write_text("1 / 0\n")
    allow(["--model", "tomllib.Own", "--data", "json.Own"])
    sys.modules.pop("tomllib", None)
    assert import_module("tomllib").loads("a = 1") == {"a": 1}


def test_a_process_that_a_run_starts_finds_it_too(place):
    (place / "mine.py").write_text("print('found')\n")
    code = "import bdclean.cli, mine"
    assert in_a_process(place, "-P", "-c", code)[0] == 1
    assert in_a_process(place, "-P", "-c", code, BDCLEAN_OWN_MODULES="mine") == (0, "found\n")


@pytest.fixture
def recorded(broken):
    """A weights file whose metadata names a module of the folder, which tells of its import."""
    (broken / "broken.py").write_text(
        "open('ran', 'w').close()\n"
        "from torch import nn\n"
        "def Net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 3))\n"
    )
    tensors = {
        **{"normalize.mean": torch.zeros(3), "normalize.std": torch.ones(3)},
        **{"backbone.0.weight": torch.rand(4, 3, 8, 8), "backbone.0.bias": torch.rand(4)},
        **{"head.weight": torch.rand(3, 4), "head.bias": torch.rand(3)},
    }
    half = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    write(tensors, broken / "net.safetensors", ModelInfo("broken:Net", 3, 8, *half).to_metadata())
    yield broken
    _NETWORKS.pop("broken:Net", None)


@pytest.mark.parametrize(
    "words",
    [
        ["check", "net.safetensors"],
        ["check", "net.safetensors", "--arch", "resnet18"],
        ["purify", "net.safetensors", "."],
        ["fit", *FIT[:-4], "--model.weights", "net.safetensors"],
        [
            *("fit", *FIT[:2], "-c", "data/photos", "-c", "purify/bcu", "--data.defense_root", "."),
            *("--model.weights", "net.safetensors", "--data.input_size", "8"),
        ],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore")
def test_a_weights_file_makes_no_module_run(words, recorded, capsys):
    Image.new("RGB", (8, 8)).save("a.png")
    said = told(words, capsys)
    assert "net.safetensors was made with a network of somebody's own (broken:Net), and" in said
    assert not (recorded / "ran").exists()


def test_a_network_that_the_user_names_is_found(recorded, capsys):
    with pytest.raises(SystemExit, match="3"):  # no test applies
        main(["check", "net.safetensors", "--arch", "broken:Net"])
    said = capsys.readouterr().out
    assert "net.safetensors: broken:Net, 3 classes, images of 8 pixels, mean" in said
    assert (recorded / "ran").exists()


def test_a_network_that_cannot_be_had_ends_with_one_message(broken, capsys):
    (broken / "broken.py").write_text("1 / 0\n")
    words = ["check", "net.safetensors", "--arch"]
    assert told([*words, "broken:Net"], capsys) == (
        "arch='broken:Net': The module broken was found (broken.py), but its import raised "
        "ZeroDivisionError in line 1: division by zero.\n"
    )
    assert told([*words, "gone:Net"], capsys).startswith("arch='gone:Net' is unknown: there is no")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["--model", "mine.Own"], {"mine"}),
        (["--model=mine.deep.Own", "--data", "other.Data"], {"mine", "other"}),
        (['--trainer.logger={"class_path": "mine.Logger"}'], {"mine"}),
        ({"trainer": {"callbacks": [{"class_path": "mine.Back"}]}}, {"mine"}),
        (["--model.recipe.lr", "0.1", "-c", "a/b.yaml", "--x=runs/v/model.safetensors"], set()),
        (["--model.arch", "timm:resnet18.a1_in1k", "model.safetensors"], set()),
        (["--arch", "solo:resnet18", "--model.arch=torchvision:resnet18"], set()),
        (["--model.arch", "mine:Net"], {"mine"}),
        (["--arch=mine.deep:Net(depth=3)@body.fc"], {"mine", "body"}),
        ({"model": {"init_args": {"arch": "mine:Net(3)"}}}, {"mine"}),
        (["-c", "{model: {init_args: {arch: mine:Net}}}", "--x", "https://a.b/c:d"], {"mine"}),
    ],
)
def test_class_paths_are_told_from_other_words(tmp_path, monkeypatch, settings, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_FINDER, "names", set())
    monkeypatch.setenv("BDCLEAN_OWN_MODULES", "")
    (tmp_path / "model.safetensors").touch()
    allow(settings)
    assert _FINDER.names == names
