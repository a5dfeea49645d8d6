"""What a command says comes next works as it is printed, from the same folder."""

import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from bdclean.checking import MarginTest, maximum_margins
from bdclean.cli import main
from bdclean.commands import demo

pytestmark = pytest.mark.filterwarnings("ignore")
CLEAN = ["-c", "trainer/cpu", "-c", "data/digits"]
BASE = [*CLEAN, "-c", "attack/badnets/digits"]
# Networks that bring the digits back to the 8x8 pixels that they have: they are quick.
SMALL = ["--model.width", "4", "--model.stem", "imagenet"]
VICTIM = ["-c", "train/supervised/fast", *SMALL, "--trainer.max_epochs", "1"]
CBD = ["-c", "purify/cbd/digits", "--model.recipe.epochs", "1", "--model.pgd.steps", "1"]
BCU = ["-c", "purify/bcu/digits", "--model.recipe.epochs", "1"]
SIMCLR = ["-c", "train/simclr/fast", *SMALL, "--trainer.max_epochs", "1"]
PROBE = ["-c", "measure/linear_probe", "--model.probe.solver", "lbfgs"]
ABL = [
    *("-c", "sift/abl/fast", *SMALL, "--model.isolation.epochs", "1"),
    *("--model.recipe.epochs", "1", "--model.unlearning.epochs", "1"),
]
PHOTOS = ["-c", "trainer/cpu", "-c", "data/photos", "--data.defense_root", "photos"]
PHOTOS += ["--data.input_size", "32"]
FROM_VICTIM = ["--model.weights", "runs/victim/model.safetensors"]
FROM_SIMCLR = ["--model.weights", "runs/simclr/model.safetensors"]
# Where the next command would take minutes, it is run with fewer steps or points.
SHORT = {
    "purify/cbd/digits": CBD[2:],
    "measure/linear_probe": PROBE[2:],
    "figure tsne": [
        *("--clean", "30", "--triggered", "20", "--adversarial", "0", "--perplexity", "5"),
    ],
}
STOPPED = ["--model.recipe.epochs", "2", "--trainer.max_steps", "2"]
KINDS = {
    "victim": (["fit", *BASE, *VICTIM], "bdclean fit -c runs/x/config.yaml -c purify/cbd/digits "),
    "clean victim": (["fit", *CLEAN, *VICTIM], "bdclean predict --run runs/x"),
    "purification": (["fit", *BASE, *CBD, *FROM_VICTIM], "bdclean figure tsne runs/x "),
    "clean purification": (["fit", *CLEAN, *BCU, *FROM_VICTIM], "bdclean predict "),
    "backbone": (
        ["fit", *BASE, *CBD, "--model.probe", "null", *FROM_VICTIM],
        "bdclean fit -c runs/x/config.yaml -c measure/linear_probe ",
    ),
    "SimCLR": (
        ["fit", *CLEAN, *SIMCLR],
        "bdclean fit -c runs/x/config.yaml -c measure/linear_probe ",
    ),
    "linear probe": (["fit", *CLEAN, *PROBE, *FROM_SIMCLR], "bdclean predict "),
    "photos": (["fit", *PHOTOS, *CBD, "--model.probe", "null", *FROM_SIMCLR], "python -c "),
    "photos, classifier": (
        ["fit", *PHOTOS, *BCU, *FROM_VICTIM, "--data.num_classes", "10"],
        "bdclean check runs/x/model.safetensors photos",
    ),
    "training set": (["fit", *BASE, *ABL], "bdclean figure tsne runs/x "),
    "clean training set": (["fit", *CLEAN, *ABL], "bdclean predict "),
    "cut short": (["fit", *BASE, *CBD, *FROM_VICTIM, *STOPPED], "bdclean fit -c trainer/cpu "),
    "test": (["test", *BASE, "-c", "measure/knn", *FROM_VICTIM], "bdclean predict "),
    "validate": (
        ["validate", *BASE, "-c", "train/supervised", *FROM_VICTIM, "--data.splits.val", "50"],
        "bdclean test ",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a victim, a backbone and photos."""
    place = tmp_path_factory.mktemp("place")
    draw = torch.Generator().manual_seed(0)
    (place / "photos").mkdir()
    for number in range(100):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / "photos" / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["fit", *BASE, *VICTIM, "--run", "runs/victim"])
        main(["fit", *CLEAN, *SIMCLR, "--run", "runs/simclr"])
    return place


def next_of(said):
    (line,) = (line for line in said.splitlines() if line.startswith("Next: "))
    return line.removeprefix("Next: ")


def run_as_printed(line, short=SHORT):
    """Runs a command that was printed, shortened where it would take long."""
    program, *words = shlex.split(line)
    if program == "python":
        option, code = words
        assert option == "-c"
        exec(code, {})  # noqa: S102  (what was printed)
        return
    fewer = [more for name, extra in short.items() if name in " ".join(words) for more in extra]
    status = 0
    try:
        main([*words, *fewer])
    except SystemExit as end:
        status = end.code
    # a network that has learned nothing may be suspicious, and no test may apply to a small one
    assert status == 0 or (words[0], status) in (("check", 1), ("check", 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_command_of_each_kind_works(kind, place, monkeypatch, capsys, tmp_path):
    words, told = KINDS[kind]
    for name in ("photos", "runs/victim", "runs/simclr"):
        link = tmp_path / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    few = partial(maximum_margins, settings=MarginTest(starts=3, steps=3))
    monkeypatch.setattr("bdclean.checking.every.maximum_margins", few)
    main([*words, "--run", "runs/x"])
    said = capsys.readouterr().out
    line = next_of(said)
    assert line.startswith(told)
    assert "test_after_fit" not in said
    run_as_printed(line, {} if kind == "cut short" else SHORT)
    if kind == "cut short":
        record = json.loads(Path("runs/x/result.json").read_text())
        assert record["protocol"]["finished"]
        assert record["metrics"]["n_clean"] == 397


def test_predictions_and_pictures_are_the_end(place, monkeypatch, capsys):
    """What is looked at next is for the user to say."""
    monkeypatch.chdir(place)
    run_as_printed("bdclean figure tsne runs/victim --out t.png")
    main(["predict", "--run", "runs/victim"])
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if "Written" in line] == [
        "Written to t.png",
        "Written to runs/victim",
    ]
    assert "Next:" not in said


def test_an_evaluation_leaves_what_the_fit_has_logged(place, monkeypatch):
    monkeypatch.chdir(place)
    words = [*VICTIM, "--data.splits.val", "50", "--run", "runs/logged"]
    main(["fit", *BASE, *words])
    before = Path("runs/logged/metrics.csv").read_bytes()
    for command in ("test", "validate", "predict", "test"):
        main([command, "--run", "runs/logged"])
    assert Path("runs/logged/metrics.csv").read_bytes() == before
    assert not list(Path("runs/logged").glob("metrics.*.csv"))
    assert Path("runs/logged/test.json").is_file()


def test_what_no_setting_could_measure_has_its_true_reason(place, monkeypatch, capsys):
    """`data/photos` switches the test off, and the user did not."""
    monkeypatch.chdir(place)
    main([*KINDS["photos"][0], "--run", "runs/reason"])
    said = capsys.readouterr().out
    assert "Nothing was measured: the data has no labelled test images." in said


@pytest.mark.parametrize("command", ["fit", "test", "validate"])
def test_a_development_run_says_that_it_was_one(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = [*BASE, "-c", "train/supervised", *FROM_VICTIM, "--data.splits.val", "50"]
    main([command, *words, "--trainer.fast_dev_run", "true", "--run", "runs/dev"])
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("This was a development run (--trainer.fast_dev_run)")
    assert "Next:" not in said
    assert "Written to" not in said
    assert not Path("runs/dev").exists()


def test_the_next_command_of_the_demo_is_that_of_getting_started(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    page = Path(__file__).parents[2] / "docs/getting_started.md"
    assert demo.NEXT in page.read_text().replace("\\\n  ", "")
    program, *words = shlex.split(demo.NEXT)
    assert program == "bdclean"
    words[words.index("--run") + 1] = "runs/of_the_demo"
    main([*words, "--trainer.max_epochs", "1"])
    assert next_of(capsys.readouterr().out).startswith("bdclean fit ")


@pytest.fixture
def fruit(tmp_path, monkeypatch):
    """Three classes of thirty images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(0)
    for label, name in enumerate(("apple", "kiwi", "plum")):
        Path("fruit", name).mkdir(parents=True)
        for number in range(30):
            pixels = torch.randint(0, 90, (16, 16, 3), generator=draw, dtype=torch.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels.numpy()).save(f"fruit/{name}/{number}.png")


SIFT = [
    *("--size", "16", "--fast", "--model.width", "4", "--model.recipe.epochs", "1"),
    *("--model.recipe.batch_size", "16", "--model.rounds.count", "1"),
    *("--model.patch.pgd.steps", "1", "--model.finetune.epochs", "1"),
    *("--model.rounds.partition_rate", "0.3", "--model.rounds.ascent_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--model.enhance_steps", "8"),
]


def test_the_next_commands_of_sift_lead_from_scores_to_a_model(fruit, capsys):
    main(["sift", "fruit", "--dry-run", *SIFT])
    said = capsys.readouterr()
    assert said.err.count("Warning: with 90 images, fewer than 1,000, ") == 1
    line = next_of(said.out)
    assert line.startswith("bdclean sift fruit --fast --size 16 --model.width 4 ")
    main(shlex.split(line)[1:])
    line = next_of(capsys.readouterr().out)
    assert line.startswith("bdclean sift fruit --fast --size 16 --copy_clean fruit-kept ")
    main(shlex.split(line)[1:])
    assert Path("fruit-kept").is_dir()
    line = next_of(capsys.readouterr().out)
    assert line.startswith("python -c ")
    run_as_printed(line)
