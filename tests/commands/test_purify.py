"""`bdclean purify`: what it writes and prints, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from tiny import make_tests_quick

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, load_model, save_like, save_model
from bdclean.cli import main
from bdclean.commands import kept_tests, purify, purifying

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT = ["--model.recipe.epochs", "1", "--trainer.precision", "32-true"]
FAMILIES = [f"--model.{family}.steps=1" for family in ("ball", "patch", "universal")]
PLAIN = ["purify", "suspect.safetensors", "photos", *SHORT, *FAMILIES]


@pytest.fixture
def place(tmp_path, monkeypatch, quick_tests):
    """A folder with a small classifier and 130 photos, in which the command runs."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(place):
    draw = np.random.default_rng(0)
    (place / "photos").mkdir()
    for number in range(130):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / f"{number}.png")
    torch.manual_seed(0)
    model = build(ModelInfo("resnet18", 6, 8, (0.5,) * 3, (0.25,) * 3, width=4))
    save_model(model, place / "suspect.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Such a folder, in which `PLAIN` has run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("plain")
        make_tests_quick(patch)
        fill(folder)
        patch.chdir(folder)
        main(PLAIN)
    return folder


def files(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["shortcut", "bcu", "cbd"])
def test_a_model_is_cleaned_and_tested_before_and_after(place, capsys, method):
    before = files(place)
    more = {"shortcut": FAMILIES, "cbd": ["--model.pgd.steps", "1"]}.get(method, [])
    main(["purify", "suspect.safetensors", "photos", "--method", method, *SHORT, *more])
    said = capsys.readouterr().out
    told = ("on this machine.", "Before, without", "After, without", "Written to")
    order = [said.index(text) for text in told]
    assert order == sorted(order)
    run = place / "runs/purified"
    assert {path: text for path, text in files(place).items() if run not in path.parents} == before
    model = load_model(run / "model.safetensors")
    assert (model.head is None) == (method == "cbd")
    checks = json.loads((run / "checks.json").read_text())
    for when in "before", "after":
        assert [each["test"] for each in checks[when]][-1] == "MM-BD"
        assert len(checks[when]) == 6
    record = json.loads((run / "result.json").read_text())
    assert record["protocol"]["finished"]
    assert record["protocol"]["labels"] == "none"
    assert record["metrics"] == {}
    assert "Whether a backdoor is gone cannot be known without its trigger." in said
    assert ("of the answers are those of the suspect." in said) == (method == "shortcut")
    assert ("of the answers did not change." in said) == (method == "bcu")
    (line,) = (
        line for line in said.splitlines() if line.startswith("As a model of bdclean: python -c")
    )
    assert "runs/purified/model.safetensors" in line


def test_the_same_command_goes_on_or_leaves_all_as_it_is(place, plain, capsys):
    shutil.copytree(plain, place, dirs_exist_ok=True)
    first = files(place)
    main(PLAIN)
    assert "this run has ended; nothing is trained" in "".join(capsys.readouterr())
    assert files(place) == first
    (place / "mine.pth").write_text("dear")
    with pytest.raises(SystemExit):
        main([*PLAIN, "--out", "mine.pth"])
    assert "--out mine.pth: it exists already" in capsys.readouterr().err
    assert (place / "mine.pth").read_text() == "dear"
    save_like("suspect.safetensors", load_model("runs/purified/model.safetensors"), "own.pth")
    main([*PLAIN, "--out", "own.pth"])  # as after a command that was stopped behind its fit


def test_what_tests_have_said_is_kept(place, capsys, monkeypatch):
    """A command that was stopped in its tests, or behind them, does not repeat them."""
    words = [*PLAIN, "--tests", "flips,decree", "--images", "110"]
    real = kept_tests.run_tests

    def stopped(model, images, tests, watch):
        assert len(images) == 110
        assert (place / "runs/purified/.lock").exists()
        if tests == ("decree",):
            raise KeyboardInterrupt
        yield from real(model, images, tests=tests, watch=watch)

    monkeypatch.setattr(kept_tests, "run_tests", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(words)
    first = capsys.readouterr().out
    ran = []

    def counted(model, images, tests, watch):
        ran.append(tests)
        yield from real(model, images, tests=tests, watch=watch)

    monkeypatch.setattr(kept_tests, "run_tests", counted)
    main(words)
    assert ran == [("decree",), ("flips",), ("decree",)]  # of the suspect one, of the product two
    said = capsys.readouterr().out
    flips = first[first.index("Before") :]
    assert flips in said
    checks = json.loads((place / "runs/purified/checks.json").read_text())
    assert [each["test"] for each in checks["before"]][-1] == "DECREE"
    main(words)
    assert len(ran) == 3
    (place / "runs/purified/.tests.json").write_text("[")
    main(words)
    assert len(ran) == 7


@pytest.fixture
def untested(monkeypatch):
    """Leaves out the tests of check."""
    monkeypatch.setattr(purifying, "_check", lambda *_: ())


def loaded_beside_the_card(place, monkeypatch):
    """What the lines of the card make, in the folder of the card."""
    names: dict = {}
    with monkeypatch.context() as patch:
        patch.chdir(place / "runs/purified")
        exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1], names)  # noqa: S102
    return names


def test_a_foreign_file_comes_back_as_it_was(place, untested, capsys, monkeypatch):
    """By the lines that are printed, in the library that it came from, under its own keys."""
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=6)
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, "theirs.pth")
    named = ["--arch", "torchvision:shufflenet_v2_x0_5", "--input_size", "16"]
    words = ["theirs.pth", "photos", *named]
    main(["purify", *words, *SHORT, *FAMILIES])
    said = capsys.readouterr().out
    lines = [line.strip() for line in said.split("Load it:\n")[1].splitlines()]
    assert len(lines) == 5
    names: dict = {}
    exec("\n".join(lines), names)  # noqa: S102  (what was printed)
    network = names["network"]
    assert isinstance(network, torchvision.models.ShuffleNetV2)
    ours = load_model("runs/purified/model.safetensors").eval()
    x = torch.rand(4, 3, 16, 16)
    normalised = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(normalised), ours(x), atol=1e-4, rtol=1e-4)
    beside = loaded_beside_the_card(place, monkeypatch)["network"]
    assert torch.equal(beside.fc.weight, network.fc.weight)
    main(["purify", *words, *SHORT, *FAMILIES, "--out", "clean.pth"])  # the run has ended
    beside = loaded_beside_the_card(place, monkeypatch)["model"]
    assert torch.equal(beside.head.weight, network.fc.weight)
    assert "they were written to clean.pth." in Path("runs/purified/README.md").read_text()
    lines = capsys.readouterr().out.split("Load it:\n")[1].splitlines()
    exec("\n".join(line.strip() for line in lines), names)  # noqa: S102  (what was printed)
    assert torch.equal(names["network"].fc.weight, network.fc.weight)
    cleaned = torch.load("clean.pth", weights_only=True)
    assert list(cleaned) == ["state_dict"]
    assert cleaned["state_dict"].keys() == network.state_dict().keys()


def test_a_vision_transformer_of_timm_comes_back(place, untested, capsys):
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=6, img_size=16)
    torch.save(theirs.state_dict(), "vit.pth")
    words = ["vit.pth", "photos", "--arch", "test_vit", "--input_size", "16"]
    main(["purify", *words, *SHORT, *FAMILIES])
    said = capsys.readouterr().out
    lines = said.split("Load it:\n")[1].splitlines()
    names: dict = {}
    exec("\n".join(line.strip() for line in lines), names)  # noqa: S102  (what was printed)
    ours = load_model("runs/purified/model.safetensors").eval()
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(names["network"].eval()((x - 0.5) / 0.5), ours(x))
        assert not torch.equal(names["network"].head.weight, theirs.head.weight)
    beside = "\n".join(line.strip() for line in lines).replace("runs/purified/", "")
    assert "purified.safetensors" in beside
    assert beside in Path("runs/purified/README.md").read_text()


def test_labels_and_a_trigger_measure_and_nothing_else(place, plain, capsys):
    (place / "labelled").mkdir()
    for number in range(6):
        (place / "labelled" / f"animal <{number}>").mkdir()
        for copy in range(2):
            photo = (place / "photos" / f"{2 * number + copy}.png").read_bytes()
            (place / "labelled" / f"animal <{number}>" / f"{copy}.png").write_bytes(photo)
    BadNets(rate=0.1, pattern="white", patch_size=3, target=3).make_trigger((8, 8)).save(
        "trigger.safetensors"
    )
    truth = ["--labels", "labelled", "--trigger", "trigger.safetensors", "--target", "3"]
    main([*PLAIN, "--run", "runs/measured", *truth])
    said = " ".join(capsys.readouterr().out.split())
    assert "On 12 labelled images: ACC" in said
    assert "; ASR" in said
    assert "; PA" in said
    measured = load_model("runs/measured/model.safetensors").state_dict()
    before = load_model(plain / "runs/purified/model.safetensors").state_dict()
    assert all(torch.equal(value, before[key]) for key, value in measured.items())
    page, card = (Path("runs/measured", name).read_text() for name in ("report.html", "README.md"))
    for text in page, card:
        assert "12 of these images were trained on" in text
        assert "10 of them with the trigger" in text
    assert "(animal &lt;" in page
    assert "animal <" not in page
    assert len(page) < 2_000_000
    assert len(re.findall(r"and their difference, in this row times \d+\.", page)) == 2
    assert "are in model.safetensors, beside this page." in page
    assert "Accuracy was not measured" in (plain / "runs/purified/README.md").read_text()


def test_files_of_others_are_not_written_over(place, capsys):
    (place / "runs").mkdir()
    (place / "runs/README.md").write_text("mine")
    with pytest.raises(SystemExit):
        main(["purify", "suspect.safetensors", "photos", "--run", "runs"])
    assert "its README.md was not written by bdclean purify" in capsys.readouterr().err
    assert (place / "runs/README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos"], "FOLDER is missing."),
        (["--method", "cbd"], "--method stands where MODEL FOLDER is expected"),
        (["suspect.safetensors", "photos", "more"], "'more' is one word too many"),
        (["suspect.safetensors", "photos", "--method", "cdb"], "--method cdb: it must be auto"),
        (["suspect.safetensors", "photos", "--metod", "cbd"], "Did you mean --method?"),
        (["suspect.safetensors", "none"], "FOLDER none is no folder"),
        (["suspect.safetensors", "photos", "--run", "photos/x"], "it lies in photos, which stays"),
        (["suspect.safetensors", "photos", "--out", "x.txt"], "--out x.txt: it must end in"),
        (["suspect.safetensors", "photos", "--out", "photos/x.pth"], "it lies in photos, which"),
        (["suspect.safetensors", "photos", "--out", "suspect.safetensors"], "it exists already"),
        (["suspect.safetensors", "photos", "--out", "x" * 300 + ".pth"], "File name too long"),
        (
            ["suspect.safetensors", "photos", "--out", "runs/purified/model.safetensors"],
            "the run has a file of this name",
        ),
        (["suspect.safetensors", "photos", "--labels", "here", "--run", "here/x"], "lies in here"),
        (["suspect.safetensors", "photos", "--labels", "here", "--out", "here/x.pth"], "in here"),
        (["suspect.safetensors", "photos", "--labels", "broken"], "0.png is not a readable image"),
        (["suspect.safetensors", "photos", "--model", "CBD"], "give --method, or use bdclean fit"),
        (["suspect.safetensors", "photos", "--model.arch", "resnet18"], "it is called --arch"),
        (["suspect.safetensors", "photos", "--trigger", "x"], "--trigger needs --labels"),
        (["suspect.safetensors", "photos", "--model.beta", "-1"], "--model.beta=-1"),
    ],
)
def test_wrong_use_is_told_and_writes_nothing(place, capsys, words, message):
    for name in ("here/1/0.png", "broken/1/0.png"):
        (place / name).parent.mkdir(parents=True)
        content = (place / "photos/0.png").read_bytes() if name.startswith("here") else b"none"
        (place / name).write_bytes(content)
    before = files(place)
    with pytest.raises(SystemExit) as end:
        main(["purify", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert files(place) == before
    assert not Path("runs").exists()


def test_a_foreign_file_is_normalised_as_it_was_published(place, untested):
    """timm's ViT has 0.5, where photos have ImageNet's mean and std."""
    asked = []

    def fit(words):
        asked.extend(words)
        return SimpleNamespace(finished=False), None

    state = timm.create_model("test_vit", num_classes=6, img_size=32).state_dict()
    torch.save(state, "suspect.pth")
    words = ["suspect.pth", "photos", "--arch", "test_vit", "--input_size", "32"]
    purify.run_purify(words, fit)
    assert {"--data.mean=[0.5, 0.5, 0.5]", "--data.std=[0.5, 0.5, 0.5]"} <= set(asked)


def test_a_canary_is_planted_and_measured(place, plain, capsys):
    main([*PLAIN, "--canary"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", and as many for the canary: " in said
    assert said.count("(planted by us in a copy)") == 2
    card = Path("runs/purified/README.md").read_text()
    assert "white patch of 3 pixels<br>" in card
    assert not list(place.glob("runs/*/run"))
    without = load_model(plain / "runs/purified/model.safetensors").state_dict()
    for key, value in load_model("runs/purified/model.safetensors").state_dict().items():
        assert torch.equal(value, without[key])
