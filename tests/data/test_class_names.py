"""Classes of an attack by their names."""

import numpy as np
import pytest
from PIL import Image

from bdclean.attacks import BadNets, TaCT
from bdclean.cli import main
from bdclean.data import Digits, ImageFolder, Splits
from bdclean.errors import AttackError

NAMES = ("0", "1", "10", "2", "go", "stop")  # in the order of the labels


@pytest.fixture
def root(tmp_path):
    for part in ("train", "test"):
        for k, name in enumerate(NAMES):
            for i in range(4):
                file = tmp_path / "signs" / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((16, 16, 3), 40 * k + i, np.uint8)).save(file)
    return tmp_path / "signs"


def data_of(root, attack):
    splits = Splits(defense=2, probe=0)
    return ImageFolder(root=str(root), input_size=16, attack=attack, splits=splits, cache=False)


@pytest.mark.parametrize(
    ("target", "label"), [("stop", 5), ("name:2", 3), ("name:stop", 5), ("10", 2), (4, 4)]
)
def test_a_target_by_name_is_its_label(root, target, label):
    data = data_of(root, BadNets(target=target, rate=0.5, patch_size=3))
    data.setup("fit")
    assert data.plan.target == label
    assert set(data.plan.labels_seen[data.plan.poison_index].tolist()) == {label}
    facts = data.describe()["attack"]
    assert (facts["target"], facts["target_name"]) == (label, NAMES[label])


def test_a_test_alone_knows_the_names(root):
    data = data_of(root, BadNets(target="stop", patch_size=3))
    data.setup("test")
    _, triggered = data.test_dataloader()
    (batch,) = triggered
    assert batch["target"].tolist() == [5] * 20  # four images of each other class
    assert 5 not in batch["label"].tolist()


def test_every_class_of_an_attack_may_have_its_name(root):
    attack = TaCT(target="stop", source_class="go", cover_classes=["name:2", 0], rate=0.1)
    data = data_of(root, attack)
    data.setup("fit")
    assert (attack.target, attack.source_class, attack.cover_classes) == (5, 4, [3, 0])
    assert set(data.plan.labels_true[data.plan.poison_index].tolist()) == {4}


def test_two_ways_to_say_one_class_are_still_one(root):
    data = data_of(root, TaCT(target="stop", source_class=5, rate=0.1))
    with pytest.raises(AttackError, match="source_class=5: it must be another class than target"):
        data.setup("fit")


def test_a_number_that_is_another_folder_is_told(root):
    data = data_of(root, BadNets(target=2, patch_size=3))
    with pytest.warns(UserWarning, match="this label is the class named 10, .* to name:2"):
        data.setup("fit")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target", [0, 4, "name:2", "stop"])
def test_other_numbers_are_not(root, target):
    data_of(root, BadNets(target=target, patch_size=3)).setup("test")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("stp", "target=stp: it must be a class of the data set, such as stop"),
        ("name:7", "target=name:7: it must be a class of the data set, such as"),
    ],
)
def test_no_such_name(root, target, message):
    data = data_of(root, BadNets(target=target, patch_size=3))
    with pytest.raises(AttackError, match=message):
        data.setup("fit")


def test_classes_without_names_have_numbers():
    data = Digits(attack=BadNets(target="three"))
    with pytest.raises(AttackError, match="an integer >= 0, since the classes here have no names"):
        data.setup("fit")


@pytest.mark.filterwarnings("ignore")  # of the command line
def test_names_on_the_command_line(root, tmp_path, capsys):
    words = "fit -c trainer/cpu --data ImageFolder --data.input_size 16 --data.splits.defense 2"
    words = [*words.split(), "-c", "train/supervised", "--data.root", str(root)]
    words += ["--data.mean", "[0,0,0]", "--data.std", "[1,1,1]", "--data.attack", "BadNets"]
    with pytest.raises(SystemExit) as refused:
        main([*words, "--data.attack.target", "stp", "--run", str(tmp_path / "run")])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith("target=stp: it must be a class of the data set, such as stop.\n")
