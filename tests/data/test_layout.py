"""Folders that people hand over: which hold classes, and which question is asked about the rest."""

import os
from io import BytesIO

import pytest
from PIL import Image

from bdclean.commands.class_folders import classes_of, training_folder
from bdclean.data import Digits, ImageFolder
from bdclean.data.layout import part_of
from bdclean.errors import BdcleanError
from bdclean.types import View

WORDS = {"input_size": 8, "cache": False}
CLASSES = ["cat", "dog"]


@pytest.fixture
def plant(tmp_path):
    """Makes files and folders (names that end in /) below a root; endings decide the content."""
    picture = BytesIO()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(picture, "PNG")

    def plant(paths):
        root = tmp_path / "set"
        for name in paths:
            path = root / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                is_picture = path.suffix == ".png" and not path.name.startswith(".")
                path.write_bytes(picture.getvalue() if is_picture else b"\0\5\26\7")
        return root

    return plant


def both(part="", *more):
    """Two classes of one picture below a folder."""
    above = f"{part}/" if part else ""
    return [*(f"{above}{name}/0.png" for name in CLASSES), *more]


READ = {
    "usual": ([*both("train"), *both("test")], "train", "test"),
    "capitals": ([*both("Train"), *both("Test")], "Train", "Test"),
    "shouted": ([*both("TRAIN"), *both("TEST")], "TRAIN", "TEST"),
    "longer": ([*both("Training"), *both("Testing"), *both("Validation")], "Training", "Testing"),
    "with images": (
        [*both("train_images"), *both("val_images"), *both("test_images")],
        "train_images",
        "test_images",
    ),
    "the other way": ([*both("images_train"), *both("images_test")], "images_train", "images_test"),
    "with set": ([*both("trainset"), *both("testset")], "trainset", "testset"),
    "with data": ([*both("Training Data"), *both("Test Data")], "Training Data", "Test Data"),
    "train and val": ([*both("train"), *both("val")], "train", None),
    "train alone": (both("train"), "train", None),
    "flat": (both(), "", None),
    "a Mac's archive": ([*both("", "__MACOSX/cat/._0.png", "__MACOSX/cat/0.png")], "", None),
    "a Mac's archive below train": (
        [*both("train", "train/__MACOSX/cat/0.png"), *both("test")],
        "train",
        "test",
    ),
    "thumbnails of a disk station": (
        [*both("", "@eaDir/cat/1.png", "cat/@eaDir/0.png/thumb.png")],
        "",
        None,
    ),
    "what systems leave": (
        both("", ".DS_Store", "Thumbs.db", "cat/desktop.ini", "cat/Thumbs.db", "cat/._0.png"),
        "",
        None,
    ),
    "a notebook's folder": (both("", ".ipynb_checkpoints/0.png", ".cache/x/0.png"), "", None),
    "a bin": (both("", "$RECYCLE.BIN/0.png", "lost+found/0.png", "#recycle/1.png"), "", None),
    "notes and tables": (both("", "readme.txt", "labels.csv", "model.pt"), "", None),
    "one folder in a class": (["cat/images/0.png", "cat/boxes.txt", "dog/images/0.png"], "", None),
    "more below a class": (both("", "cat/more/0.png", "cat/still/more/0.png"), "", None),
    "classes named as parts": (["test/0.png", "control/0.png"], "", None),
    "an export": (
        [*both("train"), *both("test"), "test_triggered/cat/0.png", "rows.csv"],
        "train",
        "test",
    ),
}


@pytest.mark.filterwarnings("ignore:.*is not read; to measure on it")
@pytest.mark.parametrize("case", READ)
def test_a_data_set_is_found(case, plant):
    paths, train, test = READ[case]
    root = plant(paths)
    data = ImageFolder(root=str(root), **WORDS)
    assert data._layout.train == root / train
    assert data._layout.test == (None if test is None else root / test)
    classes = ["control", "test"] if case == "classes named as parts" else CLASSES
    assert data.stored.classes == tuple(classes)
    deeper = 3 if case == "more below a class" else 1
    assert len(data.stored) == deeper + 1
    assert not [name for name in data.stored.files if "thumb" in name or "__" in name]
    assert data.has_test_images == (test is not None)
    if test is not None:
        assert data.test_set.classes == tuple(CLASSES)
    source = training_folder(root)
    assert (source, classes_of(source)) == (root / train, classes)


EMPTY = (
    "{root}/bat holds no images; put images in, or remove the folder if it is no class, or keep it "
    "with --data.num_classes 3."
)
ABOVE = (
    "{root}/%s is no class: it holds folders of images (%s) and no image of its own. If these are "
    "the classes or the parts, give {root}/%s; if they are one class, put their images into one "
    "folder."
)
ASKED = {
    "no folder": (
        [],
        "root={root}: there is no such folder; give one that holds train/CLASS/IMAGE.jpg and test/",
    ),
    "an empty class": (both("", "bat/"), EMPTY),
    "a class of rubbish": (both("", "bat/Thumbs.db", "bat/._0.png"), EMPTY),
    "a class of photos that are not read": (
        both("", "bat/IMG_1.HEIC"),
        "{root}/bat holds pictures that are not read (IMG_1.HEIC); convert them (.bmp, .jfif,",
    ),
    "a class of notes": (both("", "bat/readme.txt"), EMPTY),
    "an empty class that the test images lack": (
        [*both("train", "train/bat/"), *both("test")],
        EMPTY.replace("{root}", "{root}/train"),
    ),
    "an empty class below train": (
        [*both("train", "train/bat/"), *both("test", "test/bat/")],
        EMPTY.replace("{root}", "{root}/train"),
    ),
    "a folder too high": (
        [*both("set/Train"), *both("set/Test")],
        ABOVE % ("set", "Test, Train", "set"),
    ),
    "one part a folder too high": (both("set/train"), ABOVE % ("set", "train", "set")),
    "kinds of classes": (
        [*both("animals"), "machines/bus/0.png", "machines/car/0.png"],
        ABOVE % ("animals", "cat, dog", "animals"),
    ),
    "a folder beside classes": (
        both("", *(f"more/{k}/0.png" for k in range(7))),
        ABOVE % ("more", "0, 1, 2, 3, 4 ...", "more"),
    ),
    "no training images": (
        both("test"),
        "{root} holds test/ and no folder of training images; name that one train, or give the "
        "folder above the class folders.",
    ),
    "no training images, but others": (
        both("Validation"),
        "{root} holds Validation/ and no folder of training images; name that one train, or give",
    ),
    "two spellings": (
        [*both("Train"), *both("train_images")],
        "{root} holds Train, train_images, and any of them may be the train images; name the one "
        "that is meant train.",
    ),
    "train beside classes": (
        both("", "train/0.png"),
        "{root} holds train/ beside other folders with images (cat, dog). If the classes are in "
        "it, give {root}/train; if it is a class itself, rename it.",
    ),
    "train without classes": (
        ["train/0.png", "test/0.png"],
        "{root}/train holds no class folders. Expected {root}/train/CLASS/IMAGE.jpg; images",
    ),
    "only pictures": (["0.png", "1.png"], "{root} holds no class folders. Expected {root}/CLASS/"),
    "only rubbish": (
        ["__MACOSX/cat/0.png", ".cache/0.png"],
        "{root} holds no class folders. Expected {root}/CLASS/",
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_is_not_clear_is_asked_in_one_sentence(case, plant, tmp_path):
    paths, sentence = ASKED[case]
    plant(paths)
    root = tmp_path / "set"
    with pytest.raises(BdcleanError) as question:
        ImageFolder(root=str(root), **WORDS)
    assert str(question.value).startswith(sentence.format(root=root))
    with pytest.raises(BdcleanError):  # sift asks as well, if in other words
        classes_of(training_folder(root))


def test_an_empty_class_may_keep_its_number(plant):
    root = plant(both("", "bat/"))
    assert ImageFolder(root=str(root), num_classes=3, **WORDS).num_classes == 3


def test_an_empty_class_may_lack_a_folder_of_test_images(plant):
    root = plant([*both("train", "train/bat/"), *both("test")])
    data = ImageFolder(root=str(root), num_classes=3, **WORDS)
    with pytest.warns(UserWarning, match="/test/bat holds no images, so its class is not measured"):
        assert data.test_set.classes == ("bat", "cat", "dog")
    assert data.test_set.labels.tolist() == [1, 2]


def test_a_single_class_has_no_labels_to_learn(plant):
    data = ImageFolder(root=str(plant(["cat/0.png", "cat/1.png"])), **WORDS)
    with pytest.raises(BdcleanError, match="a single class, and a classifier must tell two apart"):
        data.set_view(View("train", labels=True))
    data.set_view(View("train"))
    assert data.num_rows(View("train")) == 2


TESTED = {
    "val in place of test": (
        [*both("train"), *both("val")],
        "No folder {root}/test. Expected {root}/test/CLASS/IMAGE.jpg, one folder a class; name "
        "{root}/val so, if it holds them; without test images, turn off what needs them "
        "(--test_after_fit false).",
    ),
    "a class more": (
        [*both("Train"), *both("Test", "Test/emu/0.png")],
        "{root}/Train and {root}/Test differ in the class folders ['emu']; both need the same "
        "ones.",
    ),
    "a class less": (
        [*both("train"), "test/dog/0.png"],
        "{root}/train and {root}/test differ in the class folders ['cat']; both need the same",
    ),
    "no classes": ([*both("train"), "test/0.png"], "{root}/test holds no class folders. Expected"),
}


@pytest.mark.filterwarnings("ignore:.*is not read; to measure on it")
@pytest.mark.parametrize("case", TESTED)
def test_test_images_are_asked_about(case, plant):
    paths, sentence = TESTED[case]
    root = plant(paths)
    data = ImageFolder(root=str(root), **WORDS)
    with pytest.raises(BdcleanError) as question:
        _ = data.test_set
    assert str(question.value).startswith(sentence.format(root=root))


def test_validation_images_are_no_test_set_in_silence(plant):
    root = plant([*both("train"), *both("valid")])
    with pytest.warns(UserWarning, match=r"valid/ is not read; to measure on it, name it test\."):
        ImageFolder(root=str(root), **WORDS)


def test_what_is_left_out_is_told(plant):
    root = plant([*both("train", "train/7.png", "train/x.txt"), *both("test"), "Meta/0.png"])
    with pytest.warns(UserWarning, match=r"train/ beside other .*\(Meta\), which are not read"):
        data = ImageFolder(root=str(root), **WORDS)
    with pytest.warns(UserWarning, match=r"/train holds pictures beside .* out: 7\.png \(1 in"):
        assert len(data.stored) == 2
    with pytest.raises(BdcleanError, match=r"\(Meta\)\. If the classes are in it, give"):
        training_folder(root)


@pytest.mark.parametrize(
    ("paths", "count"),
    [
        (["0.png", "holiday/1.png", "a/b/c/2.png"], 3),
        (["0.png", "@eaDir/0.png/thumb.png", "__MACOSX/0.png", ".trash/1.png", "._0.png"], 1),
        (["0.png", "Thumbs.db", "desktop.ini", ".DS_Store"], 1),
        (["train/0.png", "more/1.png"], 2),
        (["test/0.png"], 1),
    ],
)
def test_photos_are_read_at_any_depth(plant, paths, count):
    assert len(Digits(defense_root=str(plant(paths))).defense_set) == count


@pytest.mark.parametrize("parts", [("Train", "Test"), ("train_images", "val_images")])
def test_photos_are_no_data_set_with_test_images(plant, parts):
    root = plant([path for part in parts for path in both(part)])
    told = (
        f"defense_root={root}: it holds the parts of a data set ({', '.join(sorted(parts))}), and "
        f"a defender must not see test images; give one of them, such as {root}/{parts[0]}."
    )
    with pytest.raises(BdcleanError) as question:
        _ = Digits(defense_root=str(root)).defense_set
    assert str(question.value) == told
    assert len(Digits(defense_root=str(root / parts[0])).defense_set) == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "train") for name in ("train", "TRAIN", "Training", "train-set", "img_train")),
        *((name, "test") for name in ("test", "Tests", "testing", "test.images", "data-test")),
        *((name, "val") for name in ("val", "valid", "VALIDATION", "dev", "val_images")),
        *((name, None) for name in ("trains", "trainer", "test_triggered", "contest", "valley")),
        *((name, None) for name in ("train2", "images", "bullet train", "")),
    ],
)
def test_spellings_of_parts(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("name", ["scandir", "walk"])
def test_a_folder_that_may_not_be_read_is_told(plant, name, monkeypatch):
    root, whole = plant(both()), os.scandir

    def scandir(path):
        if str(path) == str(root if name == "scandir" else root / "cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BdcleanError, match=r"cannot be read \(Permission denied\); see that its"):
        _ = ImageFolder(root=str(root), **WORDS).stored
