"""The demo from end to end with settings that learn next to nothing, and once in earnest."""

import base64
import json
import os
import re
import signal
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from bdclean.backbones import load_model
from bdclean.backbones.head import cache_features
from bdclean.cli import main
from bdclean.commands import demo, demo_stages
from bdclean.commands.demo import NEXT, Demo
from bdclean.commands.demo_stages import DemoSettings, make_data
from bdclean.reporting import page as report
from bdclean.weights import read

TINY = DemoSettings(
    num_defense=100,
    width=4,
    victim_epochs=1,
    cbd_epochs=1,
    cbd_pgd_steps=1,
    bcu_epochs=1,
    tsne_iterations=250,
)
SEED = 3
KEYS = ["method", "labels", "acc", "asr", "pa", "n_clean", "n_triggered", "seconds"]
METHODS = ["victim", "victim + probe", "CBD + probe", "BCU"]
SAVED = {"victim": "victim", "CBD + probe": "cbd", "BCU": "bcu"}
OWN = {"victim.safetensors", "cbd.safetensors", "bcu.safetensors", "results.json", "report.html"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run into a folder that held a stale result and a file of somebody else's."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    out.mkdir(parents=True)
    (out / "results.json").write_text("stale")
    (out / "notes.txt").write_text("mine")
    rows = Demo(out, SEED, TINY).run()
    return SimpleNamespace(out=out, rows=rows, page=(out / "report.html").read_text())


def as_classes(model, images):
    model.eval()
    with torch.no_grad():
        return model(images.float() / 255).argmax(1)


def test_rows_in_memory_and_in_the_file_agree(finished):
    stored = json.loads((finished.out / "results.json").read_text())
    assert [list(row) for row in stored] == [KEYS] * 4
    assert [row["method"] for row in stored] == METHODS
    assert [report.Row(**row) for row in stored] == finished.rows


def test_counts_are_those_of_the_test_set(finished):
    labels = make_data(TINY, SEED).test_set.labels
    for row in finished.rows:
        assert row.n_clean == len(labels) == 397
        assert row.n_triggered == int((labels != 0).sum())
        for percent, count in (
            (row.acc, row.n_clean),
            (row.asr, row.n_triggered),
            (row.pa, row.n_triggered),
        ):
            hits = percent * count / 100
            assert hits == pytest.approx(round(hits), abs=1e-2)
        assert row.asr + row.pa <= 100
        assert row.seconds > 0


@pytest.mark.parametrize("method", SAVED)
def test_numbers_follow_from_the_saved_weights(finished, method):
    data = make_data(TINY, SEED)
    images, labels = data.test_set.images, data.test_set.labels
    model = load_model(str(finished.out / f"{SAVED[method]}.safetensors"))
    answers = as_classes(model, images)
    triggered = as_classes(model, data.trigger.poison(images))[labels != 0]
    (row,) = (row for row in finished.rows if row.method == method)
    assert row.acc == pytest.approx(100 * (answers == labels).float().mean().item(), abs=0.3)
    assert row.asr == pytest.approx(100 * (triggered == 0).float().mean().item(), abs=0.3)
    right = (triggered == labels[labels != 0]).float().mean().item()
    assert row.pa == pytest.approx(100 * right, abs=0.3)


def test_the_head_of_cbd_is_the_probe_of_its_own_backbone(finished):
    data = make_data(TINY, SEED)
    model = load_model(str(finished.out / "cbd.safetensors")).eval()
    batch = data.poisoned_set.role("probe", labels=True).everything()
    batch["image"] = batch["image"].float() / 255
    assert len(batch["label"]) == TINY.num_probe
    before = model.head.linear.weight.detach().clone()
    model.head.solve_(*cache_features(model.features, [batch]), TINY.probe_c)
    assert torch.allclose(before, model.head.linear.weight, atol=1e-3)


def test_the_files_say_what_was_done(finished):
    for name, method in (("victim", "supervised"), ("cbd", "cbd"), ("bcu", "bcu")):
        _, metadata = read(finished.out / f"{name}.safetensors")
        assert json.loads(metadata["made_by"])["method"] == method


def test_only_own_files_are_written(finished):
    assert {path.name for path in finished.out.iterdir()} == OWN | {"notes.txt"}
    assert (finished.out / "notes.txt").read_text() == "mine"


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    again = Demo(tmp_path, SEED, TINY).train()
    assert [replace(row, seconds=0) for row in again] == [
        replace(row, seconds=0) for row in finished.rows
    ]


def test_the_page_shows_every_number_and_two_pictures(finished):
    for row in finished.rows:
        cells = (cell for cell in row.cells())
        line = "".join(f"<td>{next(cells)}</td>" for _ in range(2))
        line += "".join(f'<td class="number">{cell}</td>' for cell in cells)
        assert f"<tr>{line}</tr>" in finished.page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', finished.page)
    assert len(pictures) == 2
    for picture in pictures:
        image = Image.open(BytesIO(base64.b64decode(picture)))
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_the_page_needs_nothing_else(finished):
    addresses = re.findall(r'(?:src|href)="([^"]{0,40})', finished.page)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    page = finished.page.replace("http-equiv", "")
    assert "http" not in re.sub(r'base64,[^"]+', "", page)


def test_the_page_records_the_settings(finished):
    text = re.search(r"<pre>(.*)</pre>", finished.page, re.DOTALL).group(1)
    facts = json.loads(text.replace("&quot;", '"'))
    assert facts["seed"] == SEED
    assert facts["settings"]["num_defense"] == 100
    assert facts["data"]["sizes"] == {"train": 1200, "defense": 100, "probe": 100, "val": 0}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--seed", "x"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed"),
        (["--run"], "--run"),
        (["--bogus", "1"], "--bogus"),
        (["--run", "FILE"], "--run"),
        (["--out", "FILE"], "--out: it is called --run now."),
    ],
)
def test_wrong_use_ends_with_one_message(words, key, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(SystemExit) as stop:
        main(["demo", *(str(file) if word == "FILE" else word for word in words)])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("bdclean: ")
    assert key in said.err
    assert said.err.count("\n") == 1


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Works in an empty folder, on a demo that learns next to nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "DemoSettings", lambda: TINY)
    return tmp_path


def stop_at(monkeypatch, name, signum, call=1):
    """Sends a signal at a call of a function of the demo."""
    whole, calls = getattr(demo, name), []

    def stopped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return whole(*args, **kwargs)

    monkeypatch.setattr(demo, name, stopped)


STOPS = {
    "within a fit": ("on_train_batch_start", 1, signal.SIGTERM, "Nothing is saved yet"),
    "before the first is saved": ("save_model", 1, signal.SIGINT, "Nothing is saved yet"),
    "after the first": ("measure", 1, signal.SIGTERM, "new keeps victim.safetensors"),
    "before the last": (
        *("make_bcu", 1, signal.SIGTERM),
        "new keeps victim.safetensors, cbd.safetensors",
    ),
    "in the report": (
        "feature_map",
        2,
        signal.SIGINT,
        "new keeps victim.safetensors, cbd.safetensors, bcu.safetensors, results.json",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_a_stopped_demo_says_what_stays_and_begins_anew(case, tiny, monkeypatch, capsys):
    name, call, signum, stays = STOPS[case]
    with monkeypatch.context() as patch:
        if name == "on_train_batch_start":  # Lightning makes an exit of status 1 of it
            hook = lambda *_: os.kill(os.getpid(), signum)  # noqa: E731
            patch.setattr(demo_stages.ExactResume, name, hook)
        else:
            stop_at(patch, name, signum, call)
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--run", "new"])
    assert stop.value.code == 128 + signum
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"bdclean: stopped. {stays}; run the same command again, which begins anew."
    kept = sorted(stays.split(" keeps ")[1].split(", ")) if " keeps " in stays else []
    assert sorted(path.name for path in Path().rglob("*") if path.is_file()) == kept
    assert Path("new").exists() == bool(kept)  # a folder that it made goes again
    if case == "in the report":  # the others would end alike
        main(["demo", "--run", "new"])
        assert {path.name for path in Path("new").iterdir()} == OWN


OTHERS = {
    "a run of a fit": ("config.yaml", b"run: new\nmodel:\n  class_path: bdclean.training.KNN\n"),
    "somebody's weights": ("victim.safetensors", b"mine"),
    "another one's": ("bcu.safetensors", b"\2\0\0\0\0\0\0\0{}"),
    "a folder": ("cbd.safetensors", None),
    "a folder for the table": ("results.json", None),
    "a lock": (".lock", None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_demo_writes_over_nobodys_files(case, tiny, capsys):
    name, content = OTHERS[case]
    Path("new").mkdir()
    place = Path("new", name)
    place.mkdir() if content is None else place.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--run", "new"])
    said = capsys.readouterr().err
    assert "new" in said
    assert said.startswith("bdclean: ")
    assert said.count("\n") == 1
    assert [path.name for path in Path("new").iterdir()] == [name]
    assert place.is_dir() if content is None else place.read_bytes() == content


def shown(rows, width):
    console = Console(file=StringIO(), width=width)
    console.print(report.table(rows))
    return console.file.getvalue()


def test_the_configs_for_the_digits_have_the_values_of_the_demo():
    """`attack/badnets/digits` and the like, on which getting_started rests."""
    folder = Path(__file__).parents[2] / "configs"
    files = ("attack/badnets", "train/supervised", "purify/cbd", "purify/bcu")
    trees = [yaml.safe_load((folder / f"{file}/digits.yaml").read_text()) for file in files]
    attack = trees[0]["data"]["init_args"]["attack"]["init_args"]
    victim, cbd, bcu = (tree["model"]["init_args"] for tree in trees[1:])
    demo = DemoSettings()
    assert (attack["rate"], attack["patch_size"]) == (demo.rate, demo.patch_size)
    assert victim["stem"] == demo.stem
    assert NEXT.endswith(f" --model.width {demo.width} --run runs/victim")
    assert victim["batch_size"] == demo.victim_batch
    assert victim["optimizer"]["init_args"]["lr"] == demo.victim_lr
    assert trees[1]["trainer"]["max_epochs"] == demo.victim_epochs
    names = ("epochs", "lr", "batch_size")
    for method, made in (("cbd", cbd), ("bcu", bcu)):
        wanted = [getattr(demo, f"{method}_{name.removesuffix('_size')}") for name in names]
        assert [made["recipe"][name] for name in names] == wanted
    pgd = (demo.cbd_epsilon, demo.cbd_pgd_steps, demo.cbd_step_size)
    assert (cbd["pgd"]["epsilon"], cbd["pgd"]["steps"], cbd["pgd"]["step_size"]) == pgd
    assert cbd["probe"]["c"] == demo.probe_c
    assert (bcu["strength"], bcu["recipe"]["augmentation"]) == (
        demo.bcu_strength,
        demo.bcu_augmentation,
    )


@pytest.mark.exhaustive
def test_the_real_demo(tmp_path, capsys):
    main(["demo", "--run", str(tmp_path), "--seed", "0"])
    said = capsys.readouterr()
    rows = [report.Row(**row) for row in json.loads((tmp_path / "results.json").read_text())]
    assert shown(rows, 80) in said.out
    victim, probed, cbd, bcu = rows
    assert victim.asr > 90
    assert probed.asr > 90
    assert cbd.asr < 15
    assert bcu.asr < 15
    assert cbd.acc > probed.acc - 5
    assert bcu.acc > victim.acc - 5
    for method in METHODS:
        assert re.search(rf"^{re.escape(method)}: took \d+\.\d s$", said.err, re.MULTILINE)
