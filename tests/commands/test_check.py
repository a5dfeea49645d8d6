"""`bdclean check`: what it prints, its exit status, and what it asks for."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.checking import (
    PROBES,
    Flips,
    Gathered,
    Margins,
    SmallestTrigger,
    Verdict,
)
from bdclean.checking.verdicts import (
    judge_flips,
    judge_gathering,
    judge_margins,
    judge_trigger,
    refuses_flips,
    refuses_margins,
)
from bdclean.cli import main
from bdclean.commands import check, purifying
from bdclean.commands.purify_job import Job
from bdclean.functional.gathering import Gathering

pytestmark = pytest.mark.usefixtures("quick_tests")


@pytest.fixture
def photos(tmp_path):
    """130 pictures of other sizes, at several depths."""
    draw = np.random.default_rng(0)
    for number in range(130):
        folder = tmp_path / "photos" / ("a/b" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(tmp_path / "photos")


@pytest.fixture
def save(tmp_path):
    """Saves a small network; gives its file."""

    def save(classes=6, scale=1.0):
        torch.manual_seed(0)
        model = build(ModelInfo("resnet18", classes, 8, (0.5,) * 3, (0.25,) * 3, width=4))
        if model.head is not None:
            with torch.no_grad():
                model.head.weight[-1] *= scale
        save_model(model, tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    return save


def run(capsys, *words):
    """Runs the command; gives its exit status and what it printed."""
    try:
        main(["check", *words])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr()


def test_nothing_found_is_not_called_clean(save, photos, capsys, monkeypatch):
    # Answers of a network that has learned nothing pile up at random.
    monkeypatch.setattr("bdclean.checking.verdicts.PILED", dict.fromkeys(PROBES, 1.0))
    status, said = run(capsys, save(), photos, "--images", "110")
    assert status == 0
    assert "Tested with 110 images of" in said.out
    assert "This takes a minute or two on this machine.\n" in said.out
    for name in "ball", "patch", "universal 4", "universal 8", "MM-BD":
        assert f"\n{name}: nothing found\n" in said.out
    assert "\nDECREE: nothing found\n  no trigger was found" in said.out
    assert "6 of 6 tests ran, and found nothing. No test can show that a model is" in said.out
    assert said.out.count("clean") == said.out.count("No test can show that a model is clean") == 1
    assert not said.err


def test_a_class_out_of_line_is_named_and_the_status_is_1(save, capsys):
    status, said = run(capsys, save(scale=60))
    assert status == 1
    assert "This takes a minute or two on this machine.\n" in said.out
    assert "MM-BD: suspicious, class 5\n" in said.out
    assert said.out.count("not applicable\n  it needs images: give a FOLDER") == 5
    assert said.out.endswith("model.safetensors PHOTOS\n")
    assert "\nNext: bdclean purify " in said.out
    assert "Suspicious by 1 of 1 test; answers seem to be led to class 5." in said.out


def test_json_holds_all_and_nothing_else_is_printed(save, photos, capsys):
    status, said = run(capsys, save(scale=60), photos, "--json")
    found = json.loads(said.out)
    assert status == 1
    assert found["suspicious"]
    assert (found["arch"], found["classes"], found["images"]) == ("resnet18", 6, 130)
    tests = {each["test"]: each for each in found["tests"]}
    assert list(tests) == ["ball", "patch", "universal 4", "universal 8", "DECREE", "MM-BD"]
    assert tests["MM-BD"]["target"] == 5
    assert 0 <= tests["MM-BD"]["statistics"]["p"] < 0.01
    again = json.loads(run(capsys, save(scale=60), photos, "--json")[1].out)
    assert again == found  # the same seed


@pytest.mark.parametrize(
    ("classes", "why", "times", "ran"),
    [
        (None, "the model has no classifier head, so that it has no margins", 1, 5),
        (4, "with 4 classes, flips pile up in one of them anyway", 4, 1),
    ],
)
def test_what_does_not_apply_says_why(save, photos, capsys, monkeypatch, classes, why, times, ran):
    monkeypatch.setattr("bdclean.checking.verdicts.GATHERED", dict.fromkeys(PROBES, 1.0))
    status, said = run(capsys, save(classes), photos)
    assert status == 0
    assert said.out.count(why) == times
    assert said.out.count("under the perturbation the features of the images") == ran - 1
    assert "\nDECREE: nothing found" in said.out
    assert f"{ran} of 6 tests ran, and found nothing." in said.out
    status, said = run(capsys, save(classes))
    assert status == 3
    assert "No test applies to this model." in said.out


def test_mean_and_std_of_a_foreign_file(save, tmp_path, capsys):
    state = {k: v for k, v in load_file(save(scale=60)).items() if not k.startswith("normalize")}
    state = {k.removeprefix("backbone."): v for k, v in state.items()}
    save_file(state, tmp_path / "foreign.safetensors")
    words = [str(tmp_path / "foreign.safetensors"), "--arch", "resnet18", "--width", "4"]
    words += ["--input_size", "8"]
    words += ["--mean", "[0.1,0.2,0.3]", "--std", "[0.4,0.5,0.6]"]
    status, said = run(capsys, *words)
    assert status == 1
    assert said.out.endswith(
        "--width=4 --input_size=8 '--mean=[0.1, 0.2, 0.3]' '--std=[0.4, 0.5, 0.6]'\n"
    )
    assert "images of 8 pixels, mean 0.1, 0.2, 0.3, std 0.4, 0.5, 0.6. Tested" in said.out
    assert "--std" in run(capsys, *words[:-1], "[0.4,0.5]")[1].err


def test_chosen_tests_run_alone_and_tell_how_far_they_are(save, photos, capsys, monkeypatch):
    monkeypatch.setattr("bdclean.progress.FIRST_LINE", 0.0)
    monkeypatch.setattr("bdclean.progress.BETWEEN_LINES", 0.0)
    said = run(capsys, save(), photos, "--tests", "mm-bd,Flips")[1]
    verdict = re.compile("^([^ ].*): (?:suspicious|nothing found)", re.MULTILINE)
    names = verdict.findall(said.out)
    assert names == ["ball", "patch", "universal 4", "universal 8", "MM-BD"]
    assert "DECREE" not in said.out
    ends = [line.split("  ")[0] for line in said.err.splitlines()]
    assert [each for each in ends if each.startswith("MM-BD")][-1] == "MM-BD: 6/6 classes"
    assert "ball: 2/2 steps" in ends  # of two batches
    status, said = run(capsys, save(), photos, "--tests", "flips,mmbd")
    assert status == 2
    assert "--tests='flips,mmbd': it must be some of flips, decree, mm-bd, with" in said.err


@pytest.mark.filterwarnings("ignore:1 of 131 image files")
def test_a_broken_picture_is_left_out_by_the_option_that_the_message_names(save, photos, capsys):
    (Path(photos) / "broken.png").write_bytes((Path(photos) / "0.png").read_bytes()[:60])
    words = [save(), photos, "--tests", "MM-BD"]
    status, said = run(capsys, *words)
    assert status == 2
    option = re.search(r"or leave out such files with (--data\.on_error skip)\.", said.err)[1]
    status, said = run(capsys, *words, *option.split())
    assert status == 0
    assert "Tested with 130 images of" in said.out
    job = Job("model.safetensors", photos)
    assert len(purifying._images(job, 8, "skip")) == 130


def test_few_images(save, photos, capsys):
    status, said = run(capsys, save(), photos, "--images", "99")
    assert status == 0
    assert said.out.count("99 images are too few; give 100 or more.") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.safetensors"], "none.safetensors"),
        (["{model}", "none"], "FOLDER none is no folder; give one that holds images."),
        (["{model}", "{empty}"], "No images below"),
        (["{model}", "--image", "5"], "Did you mean --images?"),
        (["{model}", "--images", "0"], "--images"),
        (["{foreign}"], "name it with arch, on the command line --arch"),
        ([], "MODEL"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(save, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "foreign.safetensors")
    places = {
        "model": save(),
        "empty": str(tmp_path / "empty"),
        "foreign": str(tmp_path / "foreign.safetensors"),
    }
    status, said = run(capsys, *(word.format(**places) for word in words))
    assert status == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_verdicts_by_their_bounds():
    piled = judge_flips(Flips("patch", 200, (10, 0, 70, 0, 0, 10)))
    assert (piled.state, piled.target) == ("suspicious", 2)
    assert piled.why == (
        "35 % of the images change to class 2 (suspicious above 20 %), and 10 % to other classes"
    )
    less = judge_flips(Flips("patch", 200, (10, 0, 40, 0, 0, 10)))
    assert (less.state, less.target) == ("nothing found", None)
    far = judge_gathering(Gathered("patch", 200, Gathering(0.46, torch.ones(1))))
    assert (far.state, far.target) == ("suspicious", None)
    assert far.why.endswith("the images go 46 % of the way to one point (suspicious above 45 %)")
    near = judge_gathering(Gathered("ball", 200, Gathering(-0.1, torch.ones(1))))
    assert near.state == "nothing found"
    assert near.why.endswith("the images do not gather (suspicious above 40 %)")
    assert judge_margins(Margins((1.0,) * 6, 0.009, 3, 9.0)).state == "suspicious"
    assert judge_margins(Margins((1.0,) * 6, 0.051, 3, 9.0)).state == "nothing found"
    assert "p = 0.051 (susp" in judge_margins(Margins((1.0,) * 6, 0.051, 3, 9.0)).why
    assert "p < 0.0001 (susp" in judge_margins(Margins((1.0,) * 6, 0.0, 3, 9.0)).why
    small = judge_trigger(SmallestTrigger(0.0961, 0.5, 9))
    assert (small.state, small.target) == ("suspicious", None)
    assert small.why.endswith("covers 9.6 % of the image (suspicious below 10 %)")
    assert judge_trigger(SmallestTrigger(0.11, 0.5, 9)).state == "nothing found"
    assert judge_trigger(SmallestTrigger(1.0, 0.5, 9)).why.startswith("no trigger was found")
    assert judge_trigger(SmallestTrigger(0.01, 0.91, 9)).state == "not applicable"
    assert refuses_flips(10, 500) is None
    assert refuses_margins(10, 32) is refuses_margins(100, 32) is None
    told = "1,000 classes of 224 pixels would take some 4,900 times as long as 10 classes of 32"
    assert str(refuses_margins(1000, 224)).startswith(told)
    assert (check.usual_count(32), check.usual_count(224)) == (500, 128)
    assert Verdict("x", "nothing found", "y").target is None
