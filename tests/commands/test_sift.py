import csv
import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from bdclean.backbones import load_model
from bdclean.cli import main
from bdclean.commands import front, sift
from bdclean.commands.class_folders import image_size
from bdclean.errors import ConfigError, DataError
from bdclean.functional import tiers
from bdclean.types import Findings, TrainingSet

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = "run: out\nmodel:\n  class_path: bdclean.sifting.AdvrBD\n"
QUICK = [
    *("--size", "16", "--fast", "--model.width", "4", "--model.recipe.epochs", "1"),
    *("--model.recipe.batch_size", "16", "--model.rounds.count", "1"),
    *("--model.patch.pgd.steps", "1", "--model.finetune.epochs", "1"),
    *("--model.rounds.partition_rate", "0.3", "--model.rounds.ascent_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--model.enhance_steps", "8"),
]


@pytest.fixture
def folder(tmp_path):
    """Three classes of thirty images that differ in colour."""
    draw = torch.Generator().manual_seed(0)
    for label, name in enumerate(("apple", "kiwi", "plum")):
        place = tmp_path / "fruit" / name
        place.mkdir(parents=True)
        for number in range(30):
            pixels = torch.randint(0, 90, (20, 20, 3), generator=draw, dtype=torch.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels.numpy()).save(place / f"{number:02}.png")
    return tmp_path / "fruit"


def state(folder):
    return {
        file.relative_to(folder): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime_ns,
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_folder_in_suspects_and_a_model_out(folder, tmp_path, capsys):
    before, out, kept = state(folder), tmp_path / "out", tmp_path / "kept"
    main(["sift", str(folder), "--run", str(out), "--copy_clean", str(kept), *QUICK])
    told = capsys.readouterr().out
    assert state(folder) == before
    rows = list(csv.DictReader((out / "suspects.csv").open()))
    assert len(rows) == 90
    assert all(row["file"].startswith(row["label_name"] + "/") for row in rows)
    names = {"": "", "0": "apple", "1": "kiwi", "2": "plum"}
    assert all(row["proposed_name"] == names[row["proposed"]] for row in rows)
    clean = {row["file"] for row in rows if row["flagged"] in ("0", "False", "false")}
    assert {file.as_posix() for file in state(kept)} == clean
    assert f"{90 - len(clean)} of 90 images are flagged" in told
    assert f"{len(clean)} files copied" in told
    assert load_model(out / "model.safetensors")(torch.rand(1, 3, 16, 16)).shape == (1, 3)
    assert (out / "suspects.png").is_file()
    again, model = tmp_path / "again", (out / "model.safetensors").read_bytes()
    steps = json.loads((out / "result.json").read_text())["cost"]["steps"]
    main(["sift", str(folder), "--run", str(out), "--copy_clean", str(again), *QUICK])
    told = capsys.readouterr().out
    assert "out holds this sift, and it is finished; nothing is trained. See model.saf" in told
    assert "suspects.csv" in told.splitlines()[0]
    assert "going on" not in told
    assert state(again) == state(kept)
    assert (out / "model.safetensors").read_bytes() == model
    assert json.loads((out / "result.json").read_text())["cost"]["steps"] == steps
    # a picture was replaced since: the flags would stand for another one
    products = [*out.glob("suspects.*"), out / "result.json", out / "model.safetensors"]
    ended = [(product.read_bytes(), product.stat().st_mtime_ns) for product in products]
    pictures = [folder / row["file"] for row in rows[:2]]
    before = [(picture, picture.read_bytes()) for picture in pictures]
    Image.new("RGB", (20, 20)).save(pictures[0])
    words = ["sift", str(folder), "--run", str(out), "--copy_clean", str(tmp_path / "no"), *QUICK]
    with pytest.raises(SystemExit):
        main(words)
    assert "1 of the 90 training samples has another image or label" in capsys.readouterr().err
    pictures[0].unlink()
    with pytest.raises(SystemExit):
        main(words)
    assert "had 90 training samples, and now there are 89" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    # what is about the old images was not written again, with the files there are now
    assert [(p.read_bytes(), p.stat().st_mtime_ns) for p in products] == ended
    for picture, content in before:
        picture.write_bytes(content)
    # another sift of the same folder is refused, and nothing has moved
    before = state(out)
    with pytest.raises(SystemExit):
        main(["sift", str(folder), "--run", str(out), *QUICK, "--model.rounds.count", "2"])
    assert "Name another folder with --run" in capsys.readouterr().err
    assert state(out) == before


def test_a_dry_run_scores_only(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["sift", str(folder), "--run", str(out), "--dry-run", *QUICK])
    assert len(list(csv.DictReader((out / "suspects.csv").open()))) == 90
    assert "Nothing was flagged" in capsys.readouterr().out


def test_scores_are_aligned_and_zero_has_no_sign(small, tmp_path, capsys):
    scores = torch.tensor([-0.0, -2.13395106e-06, -5.25e-2, -1234.5])
    words = [str(small), "--dry-run", "--run", str(tmp_path / "out")]
    sift.run_sift(words, finished(None, scores))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert told == [
        "    0.00e+00  cat/0.png",
        "   -2.13e-06  cat/1.png",
        "   -5.25e-02  dog/0.png",
        "   -1.23e+03  dog/1.png",
    ]


@pytest.mark.parametrize(("count", "warned"), [(999, True), (1000, False)])
def test_few_images_are_warned_of(count, warned, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sift, "count_images", lambda folder: count)
    sift.run_sift([str(small), "--run", str(tmp_path / "out")], finished([0]))
    said = capsys.readouterr().err
    assert said.startswith("Warning: with 999 images, fewer than 1,000, flags ") == warned
    assert said.count("\n") == int(warned)


def test_the_copy_that_comes_next_has_a_free_name(small, tmp_path, capsys):
    (tmp_path / "photos-kept").mkdir()
    sift.run_sift([str(small), "--run", str(tmp_path / "out")], finished([0]))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"Next: bdclean sift {small} --run {tmp_path}/out --copy_clean {tmp_path}/photos-kept2"
    )


def test_the_size_is_that_of_the_images(folder, tmp_path):
    assert image_size(folder) == 32
    big = tmp_path / "big" / "a"
    big.mkdir(parents=True)
    Image.new("RGB", (300, 240)).save(big / "x.jpg")
    assert image_size(tmp_path / "big") == 224
    (big / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.jpg is not a readable image"):
        image_size(tmp_path / "big")


class ReachedError(Exception):
    """The training was reached."""


def words_of(folder, *extra):
    """What `bdclean fit` would be given."""
    given = []

    def fit(words):
        given.extend(words)
        raise ReachedError

    with pytest.raises(ReachedError):
        sift.run_sift([str(folder), *extra], fit)
    return given


def finished(flagged, scores=None, held_out=0, share=0.5):
    """A fit that has these findings for the images of the folder; no flags: a dry run."""

    def fit(words):
        root = next(word for word in words if word.startswith("--data.root="))
        place = Path(root.partition("=")[2])
        files = tuple(sorted(f.relative_to(place).as_posix() for f in place.glob("*/*.png")))
        mask = torch.zeros(len(files), dtype=torch.bool)
        mask[flagged or []] = True
        judged = None if flagged is None else mask
        score = torch.arange(len(files)).float() if scores is None else scores
        found = Findings(
            score,
            judged,
            torch.arange(len(files)) // 3,
            {},
            mask.new_empty(0, 1),
            torch.arange(0),
        )
        classes = tuple(sorted({file.split("/")[0] for file in files}))
        labels = torch.tensor([classes.index(file.split("/")[0]) for file in files])
        samples = TrainingSet(labels, files, None, None, classes)
        rounds = SimpleNamespace(partition_rate=share)
        model = SimpleNamespace(findings=lambda: found, finished=True, rounds=rounds)
        everything = torch.zeros(len(labels) + held_out)
        return model, SimpleNamespace(training_set=lambda: samples, stored=everything)

    return fit


def refusal(*args, error=ConfigError):
    def fit(words):
        raise AssertionError(words)

    with pytest.raises(error) as caught:
        sift.run_sift([str(arg) for arg in args], fit)
    return str(caught.value)


@pytest.fixture
def small(tmp_path):
    """Two classes of two images."""
    for name in ("cat", "dog"):
        place = tmp_path / "photos" / name
        place.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4), (number,) * 3).save(place / f"{number}.png")
    return tmp_path / "photos"


# ---------------------------------------------------------------------- FOLDER


def test_wrong_use_ends_with_status_2(small, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sift", str(small), "--dry-run", "--copy_clean", "kept"])
    assert stop.value.code == 2
    assert "--dry_run flags nothing" in capsys.readouterr().err


def test_each_wrong_folder_has_its_message(small, tmp_path):
    def said(folder):
        return refusal(folder, "--run", tmp_path / "out", error=DataError)

    assert "is no folder" in said(tmp_path / "nowhere")
    assert "is no folder" in said(small / "cat" / "0.png")
    assert "no class folders" in said(small / "cat")
    (tmp_path / "one" / ".git").mkdir(parents=True)
    assert "no class folders" in said(tmp_path / "one")
    (tmp_path / "one" / "cat").symlink_to(small / "cat")
    assert "single class cat; at least two" in said(tmp_path / "one")
    (small / "empty").mkdir()
    assert f"{small}/empty holds no images; put images in, or remove" in said(small)
    assert not (tmp_path / "out").exists()


def test_hidden_folders_links_and_odd_names(small, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(small / name)
    (linked / ".ipynb_checkpoints").mkdir()
    assert image_size(linked) == 32
    (linked / "dog").rename(linked / "dog.png")
    assert "--data.input_size=32" in words_of(linked, "--run", str(tmp_path / "out"))
    (small / "cat" / "deep.png").mkdir()
    (small / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    assert image_size(small) == 32


def test_train_holds_the_classes_where_it_is(small, tmp_path):
    (tmp_path / "set" / "test").mkdir(parents=True)  # no class, and not looked at
    small.rename(tmp_path / "set" / "train")
    assert f"--data.root={tmp_path}/set" in words_of(tmp_path / "set", "--run", str(tmp_path / "o"))
    for part in ("val", "test_triggered", "test_leak"):
        (tmp_path / "set" / part).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / part / "x.png")
    words_of(tmp_path / "set", "--run", str(tmp_path / "o"))
    (tmp_path / "set" / "emu").mkdir()
    words_of(tmp_path / "set", "--run", str(tmp_path / "o"))
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "emu" / "x.png")
    told = refusal(tmp_path / "set", "--run", tmp_path / "o", error=DataError)
    assert "holds train/ beside other folders with images (emu)" in told
    (tmp_path / "set" / "emu" / "x.png").unlink()
    out = tmp_path / "set" / "runs"
    assert f"lies in {tmp_path}/set" in refusal(tmp_path / "set", "--run", out)


# ---------------------------------------------------------------------- OUT


def test_out_is_never_in_the_data(small, tmp_path, monkeypatch):
    for name in ("metrics.csv", "result.json", "config.yaml", "model.safetensors"):
        (small / name).write_text("run: mine\nclass_path: bdclean.data.ImageFolder\n")
    link, away = tmp_path / "link", tmp_path / "away"
    link.symlink_to(small)
    (small / "cat").rename(away)
    (small / "cat").symlink_to(away)
    before = set(tmp_path.rglob("*")), state(tmp_path)
    for out in (small, small / "runs", small / "dog", link, link / "a" / "b", away, away / "run"):
        assert "stays as it is; name a folder outside" in refusal(small, "--run", out)
    monkeypatch.chdir(small)
    assert "runs/sift: it lies in" in refusal(".")
    monkeypatch.chdir(small / "dog")
    assert "runs/sift-scores: it lies in" in refusal("..", "--dry-run")
    assert (set(tmp_path.rglob("*")), state(tmp_path)) == before


def test_out_is_new_empty_or_a_run(small, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    assert "is a file; name a folder" in refusal(small, "--run", out)
    assert f"{out} is a file; name a folder" in refusal(small, "--run", out / "deeper")
    out.unlink()
    out.mkdir()
    words_of(small, "--run", str(out))
    (out / "metrics.csv").write_text("mine")
    assert "but no run of bdclean; name a new or empty folder" in refusal(small, "--run", out)
    for text in (b"batch: 3\n", b"run: there\n", b"# run: class_path: bdclean.\n", b"\xff\xfe"):
        (out / "config.yaml").write_bytes(text)
        assert "but no run of bdclean" in refusal(small, "--run", out)
    (out / "config.yaml").write_text(OURS)
    words_of(small, "--run", str(out))
    assert (out / "metrics.csv").read_text() == "mine"
    assert "but no run of bdclean" in refusal(small, "--run", tmp_path)  # around the data


def test_a_dry_run_has_a_folder_of_its_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--run=runs/sift" in words_of(small)
    assert "--run=runs/sift-scores" in words_of(small, "--dry-run")
    assert "--run=other" in words_of(small, "--dry-run", "--run", "other")


def test_a_killed_sift_goes_on(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert not [w for w in words_of(small, "--run", str(out)) if "ckpt_path" in w]
    assert capsys.readouterr().out == ""
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last.ckpt").write_bytes(b"")
    (out / "config.yaml").write_text(OURS)
    assert words_of(small, "--run", str(out))[-1] == "--ckpt_path=last"
    assert capsys.readouterr().out == f"{out} holds a sift that was begun: going on with it.\n"
    words = words_of(small, "--run", str(out), "--ckpt_path", "other.ckpt")
    assert [w for w in words if "ckpt_path" in w] == ["--ckpt_path"]


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.width", "4", "{folder}"], "--model.width stands where FOLDER is expected"),
        (["--fast", "{folder}"], "FOLDER comes first"),
        (["{folder}", "album"], "'album' is one word too many"),
        (["{folder}", "--fast", "album"], "'album' is one word too many"),
        (["{folder}", "--out", "x"], "--out: it is called --run now."),
        (["{folder}", "--out=x"], "--out: it is called --run now."),
        (["{folder}", "--data", "x"], "FOLDER"),
        (["{folder}", "--data.root=x"], "FOLDER"),
        (["{folder}", "--data.init_args.root=x"], "FOLDER"),
        (["{folder}", "--model", "x"], "use bdclean fit for another method"),
        (["{folder}", "--model.until", "score"], "give --dry_run"),
        (["{folder}", "--trainer.max_time", "00:01:00:00"], "the same command goes on"),
    ],
)
def test_words_are_not_misread(small, args, message):
    assert message in refusal(*(word.format(folder=small) for word in args))


def test_other_words_reach_the_fit_and_ours_win(small, tmp_path):
    out = str(tmp_path / "out")
    file, flip = str(tmp_path / "x.yaml"), "--data.allow_flip=false"
    Path(file).write_text("seed_everything: 3\n")
    words = words_of(small, "-c", file, "--run", out, "--model.width", "4", flip)
    assert words[-8:] == [
        *("-c", file, "--model.width", "4", flip),
        *("--model.until=relabel", f"--run={out}", f"--data.root={small}"),
    ]
    said = refusal(small, "--run", out, "--dry", "1")  # no short forms
    assert said == "--dry: there is no such option. Did you mean --dry_run?"


@pytest.mark.parametrize(
    ("accelerator", "instructions", "precision"),
    [(False, True, "bf16-mixed"), (False, False, "32-true"), (True, False, "bf16-mixed")],
)
def test_the_precision_is_one_that_is_fast_here(
    small, tmp_path, monkeypatch, accelerator, instructions, precision
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(front, "cpu_has_bfloat16", lambda: instructions)
    words = words_of(small, "--run", str(tmp_path / "out"))
    assert f"--trainer.precision={precision}" in words


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sift", "--help"])
    assert stop.value.code == 0
    assert "bdclean sift FOLDER" in capsys.readouterr().out


# ---------------------------------------------------------------------- the copy


def test_the_copy_appears_whole_at_the_end(small, tmp_path, capsys):
    target, out = tmp_path / "new" / "kept", tmp_path / "out"
    end = finished([0, 3])

    def fit(words):
        assert not target.exists()
        assert len(list(target.parent.iterdir())) == 1  # made before the training
        return end(words)

    sift.run_sift([str(small), "--run", str(out), "--copy_clean", str(target)], fit)
    assert sorted(map(str, state(target))) == ["cat/1.png", "dog/0.png"]
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode == small.stat().st_mode
    told = capsys.readouterr().out
    assert "2 of 4 images are flagged (50.0 %)" in told
    assert f"2 files copied to {target}" in told


def test_a_copy_in_the_way_is_refused(small, tmp_path):
    out = tmp_path / "out"

    def said(target):
        return refusal(small, "--run", out, "--copy_clean", target)

    (tmp_path / "there").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("mine")
    assert "exists already" in said(tmp_path / "there")
    assert "exists already" in said(tmp_path / "nowhere")
    assert "exists already" in said(tmp_path / "file")
    assert "lies inside" in said(small / "kept")
    assert "lies inside" in said(small / "cat" / "kept")
    assert "may lie in the other" in said(out)
    assert "may lie in the other" in said(out / "kept")
    inside = refusal(small, "--run", tmp_path / "k" / "out", "--copy_clean", tmp_path / "k")
    assert "may lie in the other" in inside
    assert "cannot be written" in said(tmp_path / "file" / "kept")
    assert not out.exists()


def test_a_copy_without_room_is_told_before_it_begins(small, tmp_path, monkeypatch):
    full = SimpleNamespace(free=2**20 // 2)
    monkeypatch.setattr(front.shutil, "disk_usage", lambda place: full)
    monkeypatch.setattr(front.shutil, "copy2", lambda *args: pytest.fail("a file is copied"))
    (small / "cat" / "large.png").write_bytes(bytes(3 * 2**20))
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(ConfigError) as raised:
        front.copy_files("--copy_clean", small, ["cat/large.png"], copy, tmp_path / "target")
    assert str(raised.value) == (
        f"--copy_clean {tmp_path}/target: the copy failed (0.5 MiB are free there, and it takes "
        "3.0 MiB); make room and start the same command again, which does not train again."
    )
    assert list(copy.iterdir()) == []


def test_a_failed_copy_is_told_and_leaves_nothing(small, tmp_path):
    target = tmp_path / "new" / "kept"
    end = finished([0])

    def fit(words):
        result = end(words)
        max((small / "dog").iterdir()).unlink()
        return result

    with pytest.raises(ConfigError, match="the copy failed"):
        sift.run_sift([str(small), "--run", str(tmp_path / "o"), "--copy_clean", str(target)], fit)
    assert not target.parent.exists()
    (tmp_path / "mine").mkdir()
    other = tmp_path / "mine" / "kept"
    with pytest.raises(ConfigError, match="the copy failed"):
        sift.run_sift([str(small), "--run", str(tmp_path / "o"), "--copy_clean", str(other)], fit)
    assert list(other.parent.iterdir()) == []


def test_one_process_of_several_prints_and_copies(small, tmp_path, capsys, monkeypatch):
    target = tmp_path / "kept"
    words = [str(small), "--run", str(tmp_path / "out"), "--copy_clean", str(target)]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    sift.run_sift(words, finished([0]))
    assert capsys.readouterr().out == ""
    assert not target.exists()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    sift.run_sift(words, finished([0]))
    assert target.exists()


# ---------------------------------------------------------------------- what is told


def test_no_suspects_are_told_as_such(small, tmp_path, capsys):
    sift.run_sift([str(small), "--run", str(tmp_path / "out")], finished([]))
    told = capsys.readouterr().out
    assert "None of 4 images is flagged" in told
    assert "trained on all of them" in told
    assert "without them" not in told


def test_the_classes_that_are_named_otherwise_come_first(small, tmp_path, capsys):
    sift.run_sift([str(small), "--run", str(tmp_path / "out")], finished([1, 2, 3]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "  dog: 2 of 2, of which the clean model names 1 otherwise",
        "  cat: 1 of 2, of which the clean model names 0 otherwise",
    ]
    sift.run_sift([str(small), "--run", str(tmp_path / "new")], finished([1]))
    assert "dog" not in capsys.readouterr().out


def test_the_worst_come_first_under_their_class(small, tmp_path, capsys):
    fit = finished(None, torch.tensor([1.0, torch.nan, 5.0, 3.0]))
    sift.run_sift([str(small), "--dry-run", "--run", str(tmp_path / "out")], fit)
    told = capsys.readouterr().out
    names = [line.split()[1] for line in told.splitlines()[1:5]]
    assert names == ["dog/0.png", "dog/1.png", "cat/0.png", "cat/1.png"]


@pytest.fixture
def many(tmp_path):
    """Ten classes of ten images."""
    for kind in range(10):
        place = tmp_path / "many" / f"k{kind}"
        place.mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (4, 4), (number,) * 3).save(place / f"{number}.png")
    return tmp_path / "many"


NOT = "This result is not usable"
DOUBTS = {
    "nothing": ([], ""),
    "a tenth": (range(0, 100, 10), ""),
    "half of two classes": ([*range(5), *range(10, 15)], ""),
    "one class": (
        range(6),
        f"{NOT} before you have looked at its pictures: more than half of ",
    ),
    "two classes": (range(20), f"{NOT}: more than half is flagged of 2 of the 10 classes. 20 of "),
    "most": (range(90), f"{NOT}: more than half of all images are flagged. 90 of 100 images are "),
    "all": (range(100), f"{NOT}: more than half of all images are flagged. 100 of 100 images are "),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_what_cannot_be_trusted_is_said_first(case, many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sift, "FEWEST", 100)
    flagged, told = DOUBTS[case]
    sift.run_sift([str(many), "--run", str(tmp_path / "out")], finished(list(flagged)))
    said = capsys.readouterr().out
    first = said.splitlines()[0]
    assert first.startswith(told)
    assert (NOT in said) == bool(told)
    assert f"{len(flagged)} of 100 images are flagged" in first or not flagged
    bad = told.startswith(f"{NOT}:")
    assert ("Do not use the models in " in said) == bad
    assert ("The model that was trained" in said) != bad
    assert "target" not in said


@pytest.mark.parametrize(("count", "few"), [(100, False), (101, True)])
@pytest.mark.parametrize("flagged", [None, [], [3]])
def test_few_images_are_not_enough(count, few, flagged, many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sift, "FEWEST", count)
    sift.run_sift([str(many), "--run", str(tmp_path / "out")], finished(flagged))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{NOT}: it takes {count} images or more. ") == few


@pytest.mark.parametrize(
    ("classes", "more"), [(5, None), (6, "1 more class"), (9, "4 more classes")]
)
def test_the_list_of_classes_is_cut_with_a_count(classes, more, many, tmp_path, capsys):
    one_each = [10 * k for k in range(classes)]
    sift.run_sift([str(many), "--run", str(tmp_path / "out")], finished(one_each))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len([line for line in lines if line.startswith("  k")]) == 5
    assert lines[5:] == ([] if more is None else [f"  and some of {more}"])


def test_where_most_is_flagged_the_order_is_that_of_the_shares(many, tmp_path, capsys):
    some = [*range(10), *range(80, 88), *range(90, 96)]  # 7, 8 and 6 of them are named otherwise
    sift.run_sift([str(many), "--run", str(tmp_path / "out")], finished(some))
    lines = capsys.readouterr().out.splitlines()[1:4]
    assert [line.split(":")[0] for line in lines] == ["  k0", "  k8", "  k9"]


def judged(counts, size=120):
    """Six classes: so many of each are flagged and get the labels of all others, evenly."""
    labels = torch.arange(6).repeat_interleave(size)
    named = torch.full((6 * size,), -1)
    for label, count in enumerate(counts):
        others = [k for k in range(6) if k != label]
        named[label * size : label * size + count] = torch.tensor(others * count)[:count]
    none = torch.zeros(0, 6 * size)
    found = Findings(torch.zeros(6 * size), named >= 0, named, {}, none.bool(), none)
    files = tuple(map(str, range(6 * size)))
    return found, TrainingSet(labels, files, None, None, ("ape", "bee", "cat", "dog", "emu", "fox"))


def test_the_class_that_stands_out_is_named_with_its_tier(monkeypatch):
    monkeypatch.setattr(sift, "FEWEST", 600)
    monkeypatch.setattr(tiers, "FEWEST", 600)
    found, samples = judged([3, 60, 6, 3, 3, 3])
    first, second, *listed, last = sift._summary(found, samples, Path("r")).splitlines()
    assert first.startswith("78 of 720 images are flagged")
    assert second.startswith(
        "Class bee is probably attacked: 60 likely. So many of its 120 images (50 %) are flagged "
        "and named otherwise by the clean model, spread over 5 other classes; of the other classes "
        "2 to 5 % are"
    )
    assert listed[0] == "  bee: 60 of 120, of which the clean model names 60 otherwise"
    assert len(listed) == 6
    assert "r/model.safetensors" in last


@pytest.mark.parametrize("counts", [[4, 12, 8, 4, 4, 4], [24] * 6, [3, 0, 0, 0, 0, 0]])
def test_where_no_class_stands_out_none_is_named(counts, monkeypatch):
    monkeypatch.setattr(sift, "FEWEST", 600)
    monkeypatch.setattr(tiers, "FEWEST", 600)
    found, samples = judged(counts)
    said = sift._summary(found, samples, Path("r"))
    share = f"{100 * min(counts) / 120:.0f} to {100 * max(counts) / 120:.0f} %"
    assert f"No class stands out: {share} of each are flagged and named otherwise by" in said
    assert "That is no proof of clean images" in said
    assert not [name for name in samples.classes if f" {name}" in said]
    assert "attacked" not in said
    assert len(said.splitlines()) == 3


def test_of_few_classes_none_is_named(monkeypatch):
    monkeypatch.setattr(sift, "FEWEST", 240)
    monkeypatch.setattr(tiers, "FEWEST", 240)
    found, samples = judged([50, 3, 0, 0, 0, 0])
    few = samples.labels < 2
    found = dataclasses.replace(
        found, score=found.score[few], flagged=found.flagged[few], proposed=found.proposed[few]
    )
    samples = TrainingSet(samples.labels[few], samples.files, None, None, samples.classes[:2])
    said = sift._summary(found, samples, Path("r")).splitlines()[1]
    assert said.startswith("No class is named: of fewer than 6 classes, a hard one looks like an ")


def test_images_that_are_held_out_are_told(small, tmp_path, capsys):
    for number, told in (0, False), (3, True):
        words = [str(small), "--run", str(tmp_path / f"out{number}")]
        sift.run_sift(words, finished([1], held_out=number))
        line = "3 images held out by data.splits are neither judged nor copied"
        assert (line in capsys.readouterr().out) == told


def test_a_fit_that_was_cut_short(small, tmp_path):
    def fit(words):
        model, data = finished([0])(words)
        model.finished = False
        return model, data

    target = tmp_path / "kept"
    with pytest.raises(ConfigError, match=r"stopped before its end, so .*out holds no model"):
        sift.run_sift(
            [str(small), "--run", str(tmp_path / "out"), "--copy_clean", str(target)], fit
        )
    assert not target.exists()


@pytest.mark.parametrize(("steps", "judged"), [(2, None), (6, False), (17, True)])
def test_a_limit_in_a_file_is_told(steps, judged, folder, tmp_path, capsys):
    """A stop in the first training, at its end, or in that of the new network: no copy."""
    (tmp_path / "limit.yaml").write_text(f"trainer:\n  max_steps: {steps}\n")
    words = ["-c", str(tmp_path / "limit.yaml"), "--copy_clean", str(tmp_path / "kept"), *QUICK]
    with pytest.raises(SystemExit) as stop:
        main(["sift", str(folder), "--run", str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert "The fit was stopped before its end" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
    assert (tmp_path / "out" / "suspects.csv").exists() == (judged is not None)
    if judged is not None:
        rows = list(csv.DictReader((tmp_path / "out" / "suspects.csv").open()))
        assert {row["flagged"] for row in rows} <= ({"0", "1"} if judged else {""})
        record = json.loads((tmp_path / "out" / "result.json").read_text())["identification"]
        assert ("n_flagged" in record) == judged


def test_odd_names_are_told(tmp_path, capsys):
    for name in ("cat", "dog"):
        place = tmp_path / "photos" / name
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "\udce9.png", "png")
    words = [str(tmp_path / "photos"), "--dry-run", "--run", str(tmp_path / "out")]
    sift.run_sift(words, finished(None))
    assert r"cat/\udce9.png" in capsys.readouterr().out


# ---------------------------------------------------------------------- scores that tell nothing


@pytest.mark.parametrize("score", [0.0, -1.5, float("nan")])
def test_equal_scores_point_at_nothing(score, many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sift, "FEWEST", 1)
    fit = finished(None, torch.full((len(list(many.glob("*/*.png"))),), score))
    sift.run_sift([str(many), "--dry-run", "--run", str(tmp_path / "out")], fit)
    told = capsys.readouterr().out
    assert "suspicious" not in told
    assert "Next:" not in told
    assert told.splitlines()[0].endswith("suspects.csv. All are equal, so that they tell nothing.")


@pytest.mark.parametrize(("share", "leads"), [(0.25, True), (0.2, False)])
def test_a_dry_run_names_a_next_command_where_one_works(share, leads, small, tmp_path, capsys):
    """A sift of four images refuses a share that is less than one of them."""
    fit = finished(None, share=share)
    sift.run_sift([str(small), "--dry-run", "--run", str(tmp_path / "out")], fit)
    told = capsys.readouterr().out
    assert "suspicious" not in told
    assert ("Next: bdclean sift" in told) == leads


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fats"], "--fats: there is no such option. Did you mean --fast?"),
        (["--siez", "8"], "--siez: there is no such option. Did you mean --size?"),
        (["--model.widht", "3"], "--model.widht: AdvrBD has no such option. Did you mean --model"),
        (["--nonsense"], "--nonsense: there is no such option."),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch: there is no such option. Did you"),
    ],
)
def test_unknown_options_are_told_before_a_picture_is_read(words, told, capsys):
    """The folder is not there, which nobody has looked at yet."""
    with pytest.raises(SystemExit, match="2"):
        main(["sift", "nowhere", *words])
    assert capsys.readouterr().err.startswith(f"bdclean: {told}")


def test_a_default_folder_is_named(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sift.run_sift([str(small)], finished([1]))
    assert capsys.readouterr().out.startswith("No --run is given: this sift writes into runs/sift.")
