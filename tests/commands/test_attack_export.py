"""An exported data set read again is the data set, and its files give nothing away."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bdclean.attacks import BadNets, PhysicalBA, PoisonPlan, TaCT, Trigger, WaNet
from bdclean.cli import main
from bdclean.commands.attack_export import class_names, export
from bdclean.data import Digits, ImageFolder, ImageSet, Splits
from bdclean.data.decoding import Reading
from bdclean.data.sources import read_class_folder
from bdclean.errors import AttackError, ConfigError
from bdclean.types import View

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = ["-c", str(CONFIGS / "data/digits.yaml")]
BADNETS = ["-c", str(CONFIGS / "attack/badnets/cbd.yaml")]
OWN = {"train", "rows.csv", "plan.json", "plan.safetensors", "trigger.safetensors"}


def read_rows(out):
    with (out / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def number(file):
    return int(Path(file).stem)


class Few(Digits):
    """60 training and 20 test digits, so that a test writes few files."""

    def read_train(self):
        whole = super().read_train()
        return ImageSet(whole.images[:60], whole.labels[:60])

    def read_test(self):
        whole = super().read_test()
        return ImageSet(whole.images[:20], whole.labels[:20])


def few(**attack):
    return Few(attack=BadNets(**{"target": 6, "rate": 0.2} | attack), splits=Splits(defense=10))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All digits, exported once."""
    out = tmp_path_factory.mktemp("export") / "deep" / "digits"
    attack = BadNets(target=6, rate=0.1, position="top_left")
    data = Digits(attack=attack, splits=Splits(defense=300, probe=100))
    export(data, out)
    return SimpleNamespace(out=out, data=data, rows=read_rows(out))


def test_read_again_it_is_the_training_set_bit_for_bit(whole):
    again = ImageFolder(root=str(whole.out), cache=False)
    (batch,) = whole.data.reading_dataloader(View("train", labels=True, batch_size=2000))
    row_of = {line["file"]: int(line["row"]) for line in whole.rows}
    rows = torch.tensor([row_of[f"train/{file}"] for file in again.stored.files])
    assert rows.sort().values.tolist() == list(range(1000))
    assert torch.equal(again.stored.images, batch["image"][rows])
    assert torch.equal(again.stored.labels, batch["label"][rows])
    poison = whole.data.plan.poison_index
    clean = whole.data.stored.images[whole.data.rows.train]
    assert (batch["image"][poison] != clean[poison]).flatten(1).any(1).all()


def test_test_sets_read_again_are_those_of_the_loaders(whole):
    labels, images = whole.data.test_set.labels, whole.data.test_set.images
    for folder, expected in (("test", images), ("test_triggered", None)):
        if expected is None:
            expected = whole.data.trigger.poison(images)
        again = read_class_folder(whole.out / folder, 32, reading=Reading(cache=False))
        rows = torch.tensor([number(file) for file in again.files])
        assert torch.equal(again.images, expected[rows])
        assert torch.equal(again.labels, labels[rows])
        wanted = range(397) if folder == "test" else (labels != 6).nonzero().flatten().tolist()
        assert rows.sort().values.tolist() == list(wanted)
    assert list((whole.out / "test_triggered" / "6").iterdir()) == []


def test_rows_tell_the_truth(whole):
    plan, data = whole.data.plan, whole.data
    assert [int(line["row"]) for line in whole.rows] == list(range(1000))
    assert [int(line["base_row"]) for line in whole.rows] == data.rows.train.tolist()
    assert [int(line["label_true"]) for line in whole.rows] == plan.labels_true.tolist()
    assert [int(line["label_seen"]) for line in whole.rows] == plan.labels_seen.tolist()
    poison = [int(line["row"]) for line in whole.rows if line["poison"] == "1"]
    assert poison == plan.poison_index.tolist()
    assert {line["cover"] for line in whole.rows} == {"0"}
    assert {line["source"] for line in whole.rows} == {""}
    for line in whole.rows:
        assert line["file"].split("/")[:2] == ["train", line["label_seen"]]


def test_the_ground_truth_lies_outside_of_the_images(whole):
    assert {path.name for path in whole.out.iterdir()} == OWN | {"test", "test_triggered"}
    for folder in ("train", "test", "test_triggered"):
        files = [path for path in (whole.out / folder).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".png"}
        assert {len(path.stem) for path in files} == {3}
    with Image.open(whole.out / whole.rows[0]["file"]) as image:
        assert image.info == {}
    assert list(whole.out.parent.iterdir()) == [whole.out]


def test_plan_and_trigger_can_be_loaded(whole):
    assert PoisonPlan.load(whole.out).hash == whole.data.plan.hash
    trigger = Trigger.load(whole.out / "trigger.safetensors")
    assert trigger.fingerprint == whole.data.trigger.fingerprint


def test_plain_lines_tell_the_progress(tmp_path, capsys):
    export(few(), tmp_path / "out")
    said = capsys.readouterr()
    assert said.out == ""
    heads = [line.split("  ")[0] for line in said.err.splitlines()]
    eligible = int((few().test_set.labels != 6).sum())
    assert heads == [
        "train: 50/50 images",
        "test: 20/20 images",
        f"test_triggered: {eligible}/{eligible} images",
    ]


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 images, which files list one class after the other."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 3)):
        for name in ("cat", "dog"):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(place / f"{i:02d}.png")

    def make(attack):
        root = str(tmp_path / "images")
        return ImageFolder(root=root, input_size=8, cache=False, attack=attack)

    return make


def test_a_folder_keeps_its_class_names_and_sources(folder, tmp_path):
    data = folder(BadNets(target=1, rate=0.25))
    export(data, tmp_path / "out")
    lines = read_rows(tmp_path / "out")
    assert [line["source"] for line in lines] == list(data.stored.files)
    assert {line["file"].split("/")[1] for line in lines} == {"cat", "dog"}
    again = ImageFolder(root=str(tmp_path / "out"), input_size=8, cache=False)
    assert len(again.test_set) == 6
    assert again.stored.labels.bincount().tolist() == data.plan.labels_seen.bincount().tolist()


def test_numbers_do_not_follow_the_order_of_the_data_set(folder, tmp_path):
    """In rows' order, every number below 20 under dog/ would be a poisoned cat."""
    one, other = folder(BadNets(target=1, rate=0.25)), folder(BadNets(target=0, rate=0.5, seed=3))
    export(one, tmp_path / "one", test=False)
    export(other, tmp_path / "other", test=False)
    numbers = [number(line["file"]) for line in read_rows(tmp_path / "one")]
    assert sorted(numbers) == list(range(40))
    assert 5 <= sum(n < 20 for n in numbers[:20]) <= 15
    assert numbers == [number(line["file"]) for line in read_rows(tmp_path / "other")]


def test_a_class_that_lost_its_images_keeps_its_folder(folder, tmp_path):
    export(folder(BadNets(target=1, rate=1.0)), tmp_path / "out")
    again = ImageFolder(root=str(tmp_path / "out"), input_size=8, cache=False)
    assert again.num_classes == 2
    assert again.stored.labels.tolist() == [1] * 40
    assert len(again.test_set) == 6


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), ["00", "01", "10"]),
        (("b/1", "a/1", "c/x/1"), None),
        (("a/1", "b/1", "b/2"), None),
        (("1", "2", "3"), None),
        (("a/1", "b/1", "c/x/1"), ["a", "b", "c"]),
    ],
)
def test_class_folders_sort_as_the_classes(files, expected):
    labels = torch.tensor([0, 1, 2])
    data = SimpleNamespace(
        num_classes=11 if not files else 3,
        stored=ImageSet(torch.zeros(3, 3, 1, 1, dtype=torch.uint8), labels, tuple(files)),
    )
    names = class_names(data)
    assert names == sorted(names)
    if files:
        assert names == (expected or ["0", "1", "2"])
    else:
        assert [names[k] for k in (0, 1, 10)] == expected


def test_covers_are_marked_and_keep_their_label(tmp_path):
    data = few()
    covers = data.plan.clean_index[:3]
    plan = replace(data.plan, cover_index=covers)
    data.poisoned_set = replace(data.poisoned_set, plan=plan)
    export(data, tmp_path / "out", test=False)
    lines = read_rows(tmp_path / "out")
    assert [int(line["row"]) for line in lines if line["cover"] == "1"] == covers.tolist()
    for row in covers.tolist():
        assert lines[row]["poison"] == "0"
        assert lines[row]["label_seen"] == lines[row]["label_true"]


def test_without_test_sets(tmp_path):
    export(few(), tmp_path / "out", test=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == OWN
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["num_poison"] == 10


def test_an_empty_folder_is_filled_and_a_full_one_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(few(), out, test=False)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ConfigError, match="never overwritten"):
        export(few(seed=1), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    calls = []

    def full_disk(self, *arguments, **settings):
        calls.append(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        export(few(), tmp_path / "out")
    assert calls
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_attack_has_no_fixed_set(tmp_path):
    data = Few(attack=WaNet(mode="dynamic"), splits=Splits(defense=10))
    with pytest.raises(ConfigError, match="WaNet poisons every batch anew"):
        export(data, tmp_path / "out")
    data = Few(attack=WaNet(mode="static"), splits=Splits(defense=10))
    export(data, tmp_path / "out", test=False)


def test_further_test_sets_are_written_too(tmp_path):
    attack = TaCT(target=1, source_class=0, rate=0.05, cover_rate=0.02)
    data = Few(attack=attack, splits=Splits(defense=10))
    export(data, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == OWN | {"test", "test_triggered", "test_leak", "test_source_acc"}
    names = ("triggered", "leak", "source_acc")
    for name, loader in zip(names, data.test_dataloader()[1:], strict=True):
        written = sorted((tmp_path / "out" / f"test_{name}").rglob("*.png"))
        assert len(written) == len(loader.dataset)
        assert {number(file) for file in written} == set(loader.dataset.rows.tolist())


def test_images_that_change_in_every_batch_are_told_of(tmp_path):
    attack = PhysicalBA(target=1, rate=0.2, apply_to="poison")
    with pytest.warns(UserWarning, match="anew in every batch"):
        export(Few(attack=attack, splits=Splits(defense=10)), tmp_path / "out", test=False)


def test_pixels_that_are_not_bytes_cannot_be_exported(tmp_path):
    with pytest.raises(AttackError, match="quantize"):
        export(few(quantize="none"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_defender_alone_has_no_training_set(tmp_path):
    data = ImageFolder(defense_root=str(tmp_path), num_classes=10, attack=BadNets())
    with pytest.raises(ConfigError, match=r"init_args\.root"):
        export(data, tmp_path / "out")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--data.splits.defense", "1250", "--data.attack.rate", "0.1", "--test", "false"]
    main(["attack", "export", *DIGITS, *BADNETS, *small, "--out", str(out)])
    assert f"Written to {out}" in capsys.readouterr().out
    lines = read_rows(out)
    assert len(lines) == 50
    assert sum(line["poison"] == "1" for line in lines) == 5
    assert {path.name for path in out.iterdir()} == OWN


WRONG = {
    "no attack": ([*DIGITS, "--out", "new"], "attack is null"),
    "no out": ([*DIGITS, *BADNETS], "out"),
    "a folder with something in it": ([*DIGITS, *BADNETS, "--out", "."], "never overwritten"),
    "a file": ([*DIGITS, *BADNETS, "--out", "file"], "never overwritten"),
    "below a file": ([*DIGITS, *BADNETS, "--out", "file/new"], "cannot be written"),
    "a missing config": (["-c", "missing.yaml", "--out", "new"], "missing.yaml"),
    "no data": ([*BADNETS, "--out", "new"], "data"),
    "no such data": (
        ["-c", str(CONFIGS / "data/cifar10.yaml"), *BADNETS, "--out", "new"],
        "cifar-10-batches-py",
    ),
    "a target that is no class": (
        [*DIGITS, *BADNETS, "--out", "new", "--data.attack.target", "10"],
        "target",
    ),
    "a misspelt flag": ([*DIGITS, *BADNETS, "--out", "new", "--tests", "true"], "tests"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_wrong_use_is_one_message_and_status_two(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    words, text = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        main(["attack", "export", *words])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert text in said.err
    assert "Traceback" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sources_need_not_be_utf_8(folder, tmp_path):
    data = folder(BadNets(target=1, rate=0.25))
    cats = tmp_path / "images" / "train" / "cat"
    (cats / "00.png").rename(cats / os.fsdecode(b"caf\xe9.png"))
    export(data, tmp_path / "out")
    assert b"cat/caf\xe9.png" in (tmp_path / "out" / "rows.csv").read_bytes()
