"""The how-to pages: their code blocks are extracted and run as a user would run them."""

import importlib.util
import json
import re
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, library_state, load_model, save_model
from bdclean.checking import MarginTest, maximum_margins
from bdclean.cli import main
from bdclean.errors import ConfigError
from bdclean.shipped import names

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text):
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.startswith("bdclean ")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As the installed command has it: without the folder in which it is called.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".")])
    return tmp_path


QUICK_VICTIM = ["--model.width", "4", "--trainer.max_epochs", "1"]


def test_a_new_attack_in_25_lines(workplace):
    (code,) = blocks("how_to/new_attack.md", "python")
    assert len(code.splitlines()) <= 25
    (workplace / "stripes.py").write_text(code)
    (words,) = commands(blocks("how_to/new_attack.md", "bash")[0])
    main([*words[1:], *QUICK_VICTIM])
    record = json.loads(Path("runs/stripes/result.json").read_text())
    attack = record["data"]["attack"]
    assert attack["attack"] == "Stripes"
    assert (attack["target"], attack["every"], attack["depth"]) == (3, 2, 0.5)
    assert record["data"]["num_poisoned"] == 100

    import stripes

    from bdclean.attacks import Trigger

    saved = Trigger.load("runs/stripes/trigger.safetensors")
    assert isinstance(saved, stripes.StripesTrigger)
    wide = stripes.Stripes(quantize="floor").make_trigger((3, 5))
    images = torch.full((1, 3, 3, 5), 101, dtype=torch.uint8)
    assert wide.poison(images)[0, 0].tolist() == [[50, 101, 101, 101, 50]] * 3


def test_a_data_set_of_ones_own(workplace):
    (code,) = blocks("how_to/data_sets.md", "python")
    (workplace / "bars.py").write_text(code)
    words = commands(blocks("how_to/data_sets.md", "bash")[-1])[0]
    main([*words[1:], *QUICK_VICTIM])
    record = json.loads(Path("runs/bars/result.json").read_text())
    assert record["data"]["sizes"] == {"train": 300, "defense": 100, "probe": 0, "val": 0}
    assert record["metrics"]["n_clean"] == 100
    assert "width: 8" in Path("runs/bars/config.yaml").read_text()


def test_a_network_of_ones_own(workplace, capsys, monkeypatch):
    few = partial(maximum_margins, settings=MarginTest(starts=3, steps=3))
    monkeypatch.setattr("bdclean.checking.every.maximum_margins", few)
    (code,) = blocks("how_to/own_network.md", "python")
    (workplace / "my_networks.py").write_text(code)
    sys.modules.pop("my_networks", None)
    clean, research = map(commands, blocks("how_to/own_network.md", "bash"))
    (workplace / "photos").mkdir()
    for number in range(70):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(workplace / "photos" / f"{number}.png")
    main([*research[0][1:], "--trainer.max_epochs", "1"])
    main([*research[1][1:], "--model.recipe.epochs", "1"])
    main(research[2][1:])
    config = yaml.safe_load(Path("runs/bcu/config.yaml").read_text())
    assert config["model"]["init_args"]["arch"] == "my_networks:MyNet(depth=2)"
    with pytest.raises(ConfigError, match="no file makes bdclean import code"):
        load_model("runs/bcu/model.safetensors")

    from my_networks import MyNet

    network = MyNet()
    torch.save(network.state_dict(), "suspect.pth")
    with suppress(SystemExit):  # a network that has learned nothing may look suspicious
        main(clean[0][1:])
    few = ("recipe.epochs", "patch.steps", "universal.steps")
    capsys.readouterr()
    main([*clean[1][1:], *(word for key in few for word in (f"--model.{key}", "1"))])
    assert 'arch="my_networks:MyNet"' in capsys.readouterr().out
    network.load_state_dict(load_file("runs/cleaned/purified.safetensors"))


def test_a_new_method_in_thirty_lines(workplace):
    (code,) = blocks("how_to/new_method.md", "python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 30
    (workplace / "dropped.py").write_text(code)
    base = ["-c", "trainer/cpu", "-c", "data/digits"]
    victim = ["-c", "attack/badnets/cbd", "-c", "train/supervised/fast"]
    main(["fit", *base, *victim, *QUICK_VICTIM, "--run", "runs/victim"])
    (words,) = commands(blocks("how_to/new_method.md", "bash")[0])
    main([*words[1:], "--model.recipe.epochs", "2"])
    record = json.loads(Path("runs/dropped/result.json").read_text())
    assert record["metrics"]["n_clean"] == 397
    assert record["protocol"]["labels"] == "none"


def test_the_use_from_python(workplace, capsys):
    """The whole page, with short trainings; what Lightning says is silenced."""
    code, _ = blocks("how_to/python.md", "python")
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 40
    for long, short in (("max_epochs=40", "max_epochs=1"), ("epochs=20", "epochs=1")):
        assert long in code
        code = code.replace(long, short)
    names: dict = {}
    exec(code, names)  # noqa: S102  (the page's own lines)
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == [
        *("victim", "purified", "torch.Size([8,"),
    ]
    assert said.err == ""
    assert names["again"].finished
    for key, value in names["cbd"].product().state_dict().items():
        assert torch.equal(names["model"].state_dict()[key], value)
        assert torch.equal(names["again"].product().state_dict()[key], value)


def test_cleaning_a_model(workplace, quick_tests, capsys):
    """The page's commands, with short tests and a short training."""
    save_model(build(ModelInfo("resnet18", 6, 8, (0.5,) * 3, (0.2,) * 3, 4)), "model.safetensors")
    Path("labelled/3").mkdir(parents=True)
    Path("photos").mkdir()
    for number in range(110):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"photos/{number}.png")
    Image.fromarray(pixels.numpy()).save("labelled/3/one.png")
    BadNets(rate=0.1, target=1).make_trigger((8, 8)).save("trigger.safetensors")
    Path("plan.json").write_text('{"target": 1}')
    plain, measured = (commands(block)[0] for block in blocks("how_to/purify.md", "bash"))
    short = ["--model.recipe.epochs", "1", "--trainer.precision", "32-true"]
    main([*plain[1:], *short])
    assert "Attack success was not measured" in Path("runs/purified/README.md").read_text()
    main([*measured[1:], *short, "--run", "runs/measured"])
    page = Path("runs/measured/report.html").read_text()
    assert "1 of these images was trained on" in page


def test_checking_and_cleaning_from_python(workplace, quick_tests, capsys):
    """The page's lines, with short tests and a short training."""
    save_model(build(ModelInfo("resnet18", 6, 32, (0.5,) * 3, (0.2,) * 3, 4)), "victim.safetensors")
    Path("photos").mkdir()
    for number in range(110):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"photos/{number}.png")
    _, code = blocks("how_to/python.md", "python")
    assert '"model.recipe.epochs": 8' in code
    exec(code.replace('epochs": 8', 'epochs": 1'), {})  # noqa: S102  (the page's own lines)
    said = capsys.readouterr().out.splitlines()
    told = ["ball", "patch", "universal", "universal", "DECREE", "MM-BD"]
    assert [line.split()[0] for line in said[:6]] == told
    assert said[-1] == "torch.Size([8, 6])"
    assert Path("runs/cleaned/report.html").is_file()


def test_looking_at_attacks_and_exporting_them(workplace):
    shown, faint, exported, trained = (
        commands(block)[0] for block in blocks("how_to/attacks.md", "bash")
    )
    for words in (shown, faint, exported):
        main(words[1:])
    assert {path.name for path in Path().glob("*.png")} == {"preview.png", "faint.png"}
    (code,) = blocks("how_to/attacks.md", "python")
    names: dict = {}
    exec(code, names)  # noqa: S102  (the page's own lines)
    assert [len(names[name]) for name in ("train", "clean", "triggered")] == [1000, 397, 361]
    assert names["triggered"].classes == names["train"].classes == list("0123456789")
    main([*trained[1:], *QUICK_VICTIM])
    record = json.loads(Path("runs/exported/result.json").read_text())
    assert record["data"]["sizes"]["train"] == 1000


def test_a_backbone_from_elsewhere_is_cleaned_used_and_measured(workplace):
    """The page's lines, with small pictures and a short training."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    state = {f"module.{k}": v for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    torch.save({"state_dict": state}, "suspect.pth")
    for number in range(24):
        for place in ("photos/walk", f"images/train/{number % 2}", f"images/test/{number % 2}"):
            pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8)
            Path(place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(f"{place}/{number}.png")
    clean, measure = blocks("how_to/self_supervised.md", "bash")
    (words,) = commands(clean)
    small = ["--data.input_size", "64"]
    recipe = ["--model.recipe.epochs", "1", "--model.recipe.batch_size", "8"]
    short = [*recipe, "--model.pgd.steps", "1"]
    main([*words[1:], *small, *short])

    (code,) = blocks("how_to/self_supervised.md", "python")
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 5
    names: dict = {}
    exec(code, names)  # noqa: S102  (the page's own lines)
    ours = load_model("runs/cleaned/model.safetensors").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = names["model"].eval()(ours.normalize(images))
        assert torch.allclose(features, ours.features(images), atol=1e-5)
        theirs.fc = torch.nn.Identity()
        theirs.load_state_dict(names["weights"])
        assert torch.allclose(theirs.eval()(ours.normalize(images)), features, atol=1e-5)

    few = ["--data.splits.probe", "24", *small]  # all of them: the full-label evaluation
    for words, file in zip(commands(measure), ("probe/result", "knn/test"), strict=True):
        extra = ["--model.probe.recipe.epochs", "1"] if "fit" in words else []
        main([*words[1:], *few, *extra])
        assert json.loads(Path(f"runs/{file}.json").read_text())["metrics"]["n_clean"] == 24


def test_a_weights_file_is_inspected_and_exported(workplace, capsys):
    """The page's lines, with a small network; ONNX only where its packages are."""
    network = build(ModelInfo("resnet18", 3, 32, (0.5,) * 3, (0.5,) * 3, width=4, stem="cifar"))
    state = {f"module.{name}": tensor for name, tensor in library_state(network).items()}
    torch.save({"state_dict": state}, "suspect.pth")
    inspected, exported, onnx = (commands(each) for each in blocks("how_to/weights.md", "bash"))
    for words in (*inspected, *exported):
        main(words[1:])
    told = capsys.readouterr().out
    (shown,) = blocks("how_to/weights.md", "text")
    titles = re.findall(r"^  (\w[\w -]*?)  ", shown, re.MULTILINE)
    assert len(titles) == 9
    assert all(f"\n  {title} " in told for title in titles if title != "copies")
    names = ("plain.safetensors", "plain.pth", "folder/config.json", "ours.safetensors")
    assert all(Path(name).is_file() for name in names)
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        main(onnx[0][1:])
        assert Path("model.onnx").is_file()


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.md")]
KINDS = "trainer|data|attack|arch|train|purify|sift|measure|bound"
NAMED = rf"`((?:{KINDS})/[a-z0-9_/]*)`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_configs_that_the_pages_name_exist(page):
    text = page.read_text()
    told = [name for name in re.findall(NAMED, text) if "loss" not in name]  # `train/loss`
    assert [name for name in told if not names(name.rstrip("/"))] == []
    given = re.findall(r"(?:-c|--config)[ =]([\w/.]+)", text.replace("ATTACK", "badnets"))
    theirs = ("runs/", "...", "NAME", "mine.yaml")
    assert [name for name in given if name not in names() and not name.startswith(theirs)] == []


def test_the_pages_name_configs():
    assert sum(len(re.findall(NAMED, page.read_text())) for page in PAGES) > 50


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
