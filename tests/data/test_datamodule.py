"""Roles, hidden labels, poisoned rows and evaluation sets."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bdclean.attacks import BadNets, WaNet
from bdclean.data import (
    CIFAR10,
    Digits,
    ImageFolder,
    ImageNet100,
    Imagenette,
    RoleImages,
    Splits,
)
from bdclean.data.loading import TrainLoader, evaluation_loader
from bdclean.errors import AttackError, ConfigError, DataError
from bdclean.types import View, ViewableData

SPLITS = Splits(defense=300, probe=100, val=50)


def digits(**arguments):
    arguments = {
        "attack": BadNets(target=6, rate=0.1, position="top_left"),
        "splits": SPLITS,
    } | arguments
    return Digits(**arguments)


def everything(loader):
    batches = [dict(batch) for batch in loader]
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0] if k != "draw"}


@pytest.fixture(scope="module")
def data():
    return digits()


def test_it_is_what_methods_may_ask(data):
    assert isinstance(data, ViewableData)


def test_the_training_set_is_poisoned_exactly_where_planned(data):
    seen = everything(data.reading_dataloader(View("train", labels=True)))
    clean = data.stored.images[data.rows.train]
    changed = (seen["image"] != clean).flatten(1).any(1)
    plan = data.plan
    assert len(plan.poison_index) == round(0.1 * len(clean)) == 95
    untouched = torch.ones(len(clean), dtype=torch.bool)
    untouched[plan.poison_index] = False
    assert not changed[untouched].any()
    patch = seen["image"][plan.poison_index][:, :, :3, :3]
    assert (patch == patch[0]).all()
    assert (seen["label"][plan.poison_index] == 6).all()
    assert torch.equal(seen["label"], plan.labels_seen)
    assert (seen["image"][:, :, 3:, 3:] == clean[:, :, 3:, 3:]).all()


def test_the_stored_images_stay_clean(data):
    before = data.stored.images.clone()
    everything(data.reading_dataloader(View("train", labels=True)))
    data.test_dataloader()
    assert torch.equal(data.stored.images, before)


@pytest.mark.parametrize("role", ["train", "defense", "probe"])
def test_labels_are_absent_unless_asked_for(data, role):
    assert "label" not in everything(data.reading_dataloader(View(role)))


def test_labels_of_the_defense_are_refused_while_hidden(data):
    with pytest.raises(
        ConfigError, match=r"defense_labels=hidden: .* set defense_labels to visible"
    ):
        data.reading_dataloader(View("defense", labels=True))
    shown = digits(defense_labels="visible").reading_dataloader(View("defense", labels=True))
    assert len(everything(shown)["label"]) == 300


def test_defense_and_probe_are_clean_versions(data):
    for role in ("defense", "probe"):
        seen = everything(data.reading_dataloader(View(role)))
        assert torch.equal(seen["image"], data.stored.images[getattr(data.rows, role)])


def test_the_plan_does_not_depend_on_the_training_seed():
    torch.manual_seed(1)
    first = digits().plan.hash
    torch.manual_seed(2)
    assert digits(shuffle_seed=9).plan.hash == first
    assert digits(attack=BadNets(target=6, rate=0.1, seed=1)).plan.hash != first


def test_evaluation_sets(data):
    for loaders, labels in (
        (data.test_dataloader(), data.test_set.labels),
        (data.val_dataloader(), data.stored.labels[data.rows.val]),
    ):
        clean, triggered = map(everything, loaders)
        assert torch.equal(clean["label"], labels)
        assert torch.equal(clean["target"], torch.where(labels == 6, -1, 6))  # -1 does not count
        assert len(triggered["label"]) == (labels != 6).sum()
        assert not (triggered["label"] == 6).any()
        assert (triggered["target"] == 6).all()
        assert torch.equal(triggered["label"], labels[labels != 6])


def test_without_an_attack_there_is_only_the_clean_set():
    data = digits(attack=None, splits=Splits())
    assert len(data.test_dataloader()) == 1
    assert data.plan is None


def test_validation_never_falls_back_to_test_images():
    with pytest.raises(ConfigError, match=r"^splits\.val=0: "):
        digits(splits=Splits()).val_dataloader()


def test_an_empty_role_names_the_key():
    with pytest.raises(ConfigError, match=r"^splits\.probe=0: "):
        digits(splits=Splits()).reading_dataloader(View("probe", labels=True))


def test_a_batch_larger_than_the_role_is_refused(data):
    data.set_view(View("defense", batch_size=301, drop_last=True))
    with pytest.raises(ConfigError, match="300 images"):
        data.train_dataloader()


def make_loader(rank=0, world_size=1, epoch=0, number=50, batch_size=10):
    images = RoleImages(torch.zeros(number, 3, 4, 4, dtype=torch.uint8), torch.arange(number))
    facts = {"batch_size": batch_size, "seed": 3, "rank": rank, "world_size": world_size}
    loader = TrainLoader(images, **facts)
    loader.sampler.set_epoch(epoch)
    return loader


def order(batches):
    return [(b["index"].tolist(), b["draw"]) for b in batches]


def test_order_and_draws_are_functions_of_seed_epoch_step_and_rank():
    assert order(make_loader()) == order(make_loader())
    assert order(make_loader()) != order(make_loader(epoch=1))
    ranks = [order(make_loader(rank, 2)) for rank in (0, 1)]
    assert {d for _, d in ranks[0]}.isdisjoint(d for _, d in ranks[1])
    seen = sorted(i for part in ranks for index, _ in part for i in index)
    assert seen == list(range(50))
    places = [(rank, epoch) for rank in (0, 1) for epoch in (0, 1)]
    draws = [d for rank, epoch in places for _, d in order(make_loader(rank, 2, epoch))]
    assert len(set(draws)) == len(draws) == 4 * 5


@pytest.mark.parametrize(
    ("number", "batch_size", "world_size", "sizes"),
    [
        (25, 8, 1, [8, 8, 8]),
        (50, 16, 2, [8, 8, 8]),
        (26, 8, 1, [8, 8, 8, 2]),
        (8, 8, 1, [8]),
        (1, 8, 1, [1]),
        (3, 1, 1, [1, 1, 1]),
    ],
)
def test_no_last_batch_of_one_image(number, batch_size, world_size, sizes):
    loader = make_loader(number=number, batch_size=batch_size, world_size=world_size)
    assert [len(batch["index"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equal_seeds_do_not_put_the_poison_first(seed):
    """Plan, split and order all draw permutations; with one seed they must not be the same."""
    attack = BadNets(target=6, rate=0.1, seed=seed)
    data = digits(attack=attack, splits=Splits(seed=seed), shuffle_seed=seed)
    poison = torch.zeros(1400, dtype=torch.bool)
    poison[data.plan.poison_index] = True
    data.set_view(View("train", batch_size=140))
    shares = [poison[batch["index"]].float().mean().item() for batch in data.train_dataloader()]
    assert max(shares) < 0.25
    assert min(shares) > 0


def test_a_stopped_epoch_continues_at_its_next_batch():
    whole = order(make_loader(epoch=4))
    stopped = make_loader(epoch=4)
    batches = iter(stopped)
    first = order([next(batches) for _ in range(3)])
    resumed = make_loader(epoch=4)
    resumed.load_state_dict(stopped.state_dict())
    assert first + order(resumed) == whole
    resumed.sampler.set_epoch(5)
    assert order(resumed) == order(make_loader(epoch=5))


def test_a_finished_epoch_starts_anew():
    loader = make_loader()
    list(loader)
    assert loader.state_dict() == {"done": 0}


def test_augmentation_is_drawn_per_image_and_per_view(data):
    data.set_view(View("defense", "weak", views=2, batch_size=300))
    (batch,) = data.train_dataloader()
    draw = batch["draw"]
    ready = data.on_after_batch_transfer(dict(batch), 0)
    again = data.on_after_batch_transfer(dict(batch) | {"draw": draw}, 0)
    assert ready["image"].dtype == torch.float32
    assert ready["image"].max() <= 1
    assert torch.equal(ready["image"].mul(255).round().to(torch.uint8), batch["image"])
    one, two = ready["views"]
    assert not torch.equal(one, two)
    assert torch.equal(one, again["views"][0])
    assert "draw" not in ready
    moved = (one != ready["image"]).flatten(1).any(1)
    assert 0 < moved.sum() <= 300


# ---------------------------------------------------------------------- folders


def write_image(path, colour, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            for i in range(3):
                write_image(tmp_path / "set" / part / name / f"{i}.png", 100 * k + i)
    return tmp_path / "set"


def test_image_folder_reads_classes_in_sorted_order(folder):
    data = ImageFolder(root=str(folder), input_size=16)
    assert data.num_classes == 2
    assert data.stored.images.shape == (6, 3, 16, 16)
    assert data.stored.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.stored.images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert data.stored.files[3] == "dog/0.png"
    assert data.training_set().classes == ("cat", "dog")


def test_the_cache_notices_a_changed_file(folder):
    assert ImageFolder(root=str(folder), input_size=16).stored.images[0, 0, 0, 0] == 0
    write_image(folder / "train" / "cat" / "0.png", 77, size=(41, 32))
    assert ImageFolder(root=str(folder), input_size=16).stored.images[0, 0, 0, 0] == 77


def test_a_flat_folder_serves_the_defense(tmp_path, folder):
    for i in range(4):
        write_image(tmp_path / "photos" / "deep" / f"{i}.jpg", 50)
    data = ImageFolder(num_classes=10, input_size=16, defense_root=str(tmp_path / "photos"))
    data.setup("fit")
    seen = everything(data.reading_dataloader(View("defense")))
    assert seen["image"].shape == (4, 3, 16, 16)
    with pytest.raises(
        ConfigError, match=r"defense_root=.*photos: images of a folder have no labels"
    ):
        data.reading_dataloader(View("defense", labels=True))
    with pytest.raises(DataError, match="root=null: without it there are no test images"):
        data.test_dataloader()
    assert data.describe()["sizes"]["defense"] == 4


def test_a_flat_folder_is_decoded_once_beforehand_or_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_image(tmp_path / "photos" / "0.jpg", 50)
    words = {"num_classes": 10, "input_size": 16, "defense_root": "~/photos"}
    data = ImageFolder(**words, cache=False)
    data.prepare_data()
    assert len(data.defense_set) == 1
    assert not (tmp_path / "cache").exists()
    ImageFolder(**words).prepare_data()
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    ImageFolder(**(words | {"defense_root": "~/gone"})).prepare_data()  # told where it is read


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda p: ImageFolder(root=str(p / "none")), DataError, "there is no such folder"),
        (lambda p: ImageFolder(), ConfigError, "^root=null: "),
        (lambda p: ImageFolder(root=str(p / "set"), num_classes=3), ConfigError, "has 2"),
        (lambda p: CIFAR10(root=str(p)).stored, DataError, "cifar-10-batches-py"),
        (lambda p: Digits(defense_root=str(p / "no")).defense_set, DataError, "No folder"),
        (lambda p: Digits(defense_root=str(p / "empty")).defense_set, DataError, "No images"),
    ],
)
def test_missing_data_says_what_to_do(folder, tmp_path, make, error, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=text):
        make(tmp_path)


def test_a_broken_image_is_named(folder):
    (folder / "train" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cat/1\.png is not a readable image"):
        _ = ImageFolder(root=str(folder), input_size=16).stored


def test_skipped_files_are_counted_and_recorded(folder, tmp_path):
    for name in ("train/dog/0", "train/cat/1", "test/cat/2"):
        (folder / f"{name}.png").write_bytes(b"not an image")
    words = {"input_size": 16, "cache": False, "on_error": "skip"}
    data = ImageFolder(root=str(folder), defense_root=str(folder / "test"), **words)
    told = r"2 of 6 image files below .*/train cannot be read and are left out, cat/1\.png for one"
    with pytest.warns(UserWarning, match=told):
        assert data.stored.labels.tolist() == [0, 0, 1, 1]
    assert data.stored.files == ("cat/0.png", "cat/2.png", "dog/1.png", "dog/2.png")
    assert data.stored.images[:, 0, 0, 0].tolist() == [0, 2, 101, 102]
    with pytest.warns(UserWarning, match="1 of 6"):
        assert len(data.defense_set) == 5
    assert data.describe()["skipped"] == {
        "training images": {"number": 2, "first": ["cat/1.png", "dog/0.png"]},
        "defence images": {"number": 1, "first": ["cat/2.png"]},
    }
    with pytest.warns(UserWarning, match="1 of 6"):
        assert len(data.test_set) == 5
    assert data.describe()["skipped"]["test images"] == {"number": 1, "first": ["cat/2.png"]}
    whole = ImageFolder(root=str(folder), defense_root=str(folder / "test"), **words)
    with pytest.warns(UserWarning, match="left out"):
        assert data.identity() == whole.identity()
    for file in (folder / "train" / "cat").iterdir():
        file.write_bytes(b"")
    none = pytest.raises(DataError, match=r"None of the 3 images in .*train/cat can be read")
    with none, pytest.warns(UserWarning, match="4 of 6"):
        _ = ImageFolder(root=str(folder), **words).stored


def test_a_record_without_skipped_files_says_nothing_of_them(folder):
    data = ImageFolder(root=str(folder), input_size=16, cache=False, on_error="skip")
    assert len(data.stored) == 6
    assert "skipped" not in data.describe()


@pytest.mark.parametrize("module", [Imagenette, ImageNet100])
def test_photos_of_the_papers_are_not_turned(module):
    assert ImageFolder(num_classes=2, defense_root="x").reading.exif_orientation
    assert not module().reading.exif_orientation
    assert module(exif_orientation=True).reading.exif_orientation


def test_hidden_folders_are_no_classes(folder):
    for part in ("train", "test"):
        write_image(folder / part / ".ipynb_checkpoints" / "0.png", 1)
    write_image(folder / "train" / ".cache" / "0.png", 1)
    data = ImageFolder(root=str(folder), input_size=16, cache=False)
    assert data.num_classes == 2
    assert not [name for name in (*data.stored.files, *data.test_set.files) if name[0] == "."]


def test_pictures_that_are_not_read_are_told_of(folder):
    for place in ("train/cat/1.HEIC", "train/dog/2.gif", "train/.trash/3.gif", "train/cat/note.md"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"")
    words = {"num_classes": 2, "input_size": 16, "cache": False}
    with pytest.warns(UserWarning, match=r"2 pictures .*train are left out, 1\.HEIC for one"):
        _ = ImageFolder(root=str(folder), **words).stored
    with pytest.warns(UserWarning, match=r"2 pictures"):
        _ = ImageFolder(defense_root=str(folder / "train"), **words).defense_set


def test_an_empty_class_folder_keeps_its_number_where_that_is_meant(folder):
    """A poisoned set that was exported may have lost all images of a class."""
    for part in ("train", "test"):
        (folder / part / "bat" / "deep.png").mkdir(parents=True)
    words = {"root": str(folder), "input_size": 16, "cache": False}
    told = r"train/bat holds no images; .*--data\.num_classes 3\.$"
    with pytest.raises(DataError, match=told):
        ImageFolder(**words)
    assert ImageFolder(num_classes=3, **words).num_classes == 3
    write_image(folder / "test" / "bat" / "0.png", 1)
    assert ImageFolder(**words).num_classes == 3
    # A test folder need not have all classes: that of triggered images lacks the target's.
    (folder / "test" / "bat" / "0.png").rename(folder / "train" / "bat" / "0.png")
    data = ImageFolder(**words)
    with pytest.warns(UserWarning, match=r"test/bat holds no images, so its class is not measured"):
        assert sorted(set(data.test_set.labels.tolist())) == [1, 2]


def test_class_folders_must_agree(folder):
    write_image(folder / "test" / "emu" / "0.png", 1)
    with pytest.raises(DataError, match="emu"):
        _ = ImageFolder(root=str(folder), input_size=16).test_set


def test_linked_folders_are_read_and_never_twice(folder):
    cats = folder / "train" / "cat"
    (cats / "more").symlink_to(folder / "test" / "dog")
    (cats / "itself").symlink_to(cats)
    (cats / "above").symlink_to(folder)
    (folder / "test" / "dog" / "back").symlink_to(cats)
    data = ImageFolder(root=str(folder), input_size=16, cache=False)
    names = [name for name in data.stored.files if name.startswith("cat/")]
    assert names == [f"cat/{i}.png" for i in range(3)] + [f"cat/more/{i}.png" for i in range(3)]


def test_common_endings_are_read(folder):
    cats = folder / "train" / "cat"
    write_image(folder / "grey.jpg", 50)
    for i, ending in enumerate(("jfif", "jpe", "JPEG")):
        shutil.copy(folder / "grey.jpg", cats / f"{i}.{ending}")
    Image.new("L", (20, 20), 90).save(cats / "9.pgm")
    data = ImageFolder(root=str(folder), input_size=16, cache=False)
    levels = data.stored.images[:7, 0, 0, 0].tolist()
    assert [name.removeprefix("cat/") for name in data.stored.files[:7]] == [
        *("0.jfif", "0.png", "1.jpe", "1.png", "2.JPEG", "2.png", "9.pgm")
    ]
    assert (levels[1], levels[6]) == (0, 90)


@pytest.mark.parametrize("attack", [BadNets(quantize="none"), WaNet(quantize="none")])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_pixels_that_cannot_be_stored_are_refused_at_once(attack, stage):
    with pytest.raises(AttackError, match="it must be round or floor"):
        Digits(attack=attack).setup(stage)


def test_wrong_sizes_of_evaluation_are_refused():
    with pytest.raises(ConfigError, match=r"^eval_batch_size=0: it must be at least 1"):
        Digits(eval_batch_size=0)
    few = RoleImages(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    with pytest.raises(ConfigError, match="3 images cannot be evaluated on 4 devices"):
        evaluation_loader(few, batch_size=2, world_size=4)


def test_all_images_may_be_labelled_ones(folder):
    """Full-label evaluation of a backbone, also with a trigger; nothing is trained on."""
    splits, attack = Splits(probe=6), BadNets(target=1)
    data = ImageFolder(root=str(folder), input_size=16, splits=splits, attack=attack)
    data.setup("fit")
    assert len(everything(data.reading_dataloader(View("probe", labels=True)))["label"]) == 6
    assert len(data.test_dataloader()) == 2
    assert data.describe()["attack"]["attack"] == "BadNets"
    assert "plan_hash" not in data.describe()
    with pytest.raises(ConfigError, match=r"^splits: .* train has no images; lower the numbers"):
        data.train_dataloader()
