"""Configs are found by name, and a path wins."""

from pathlib import Path

import pytest

from bdclean.errors import ConfigError
from bdclean.shipped import find, folder, names, path_of, with_paths

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)


def test_a_checkout_has_the_configs_next_to_the_package():
    assert folder() == CONFIGS
    assert names() == sorted(names())
    assert len(names()) == len(list(CONFIGS.rglob("*.yaml")))


def test_names_below_a_name():
    assert names("measure") == ["measure/knn", "measure/linear_probe"]
    assert names("data/cifar10") == ["data/cifar10", "data/cifar10/folder"]  # and not cifar100
    assert names("data/cifar") == []


def test_a_name_is_a_file_also_where_a_folder_has_that_name():
    assert find("purify/cbd", "-c") == CONFIGS / "purify/cbd.yaml"
    assert find("purify/cbd/fast", "-c") == CONFIGS / "purify/cbd/fast.yaml"


WORDS = ["fit", "-c", "purify/cbd", "--config", "data/digits", "-c=arch/resnet34"]


def test_the_four_ways_to_give_a_config():
    assert with_paths([*WORDS, "--config=attack/none"]) == [
        "fit",
        *("-c", f"{CONFIGS}/purify/cbd.yaml", "--config", f"{CONFIGS}/data/digits.yaml"),
        *(f"-c={CONFIGS}/arch/resnet34.yaml", f"--config={CONFIGS}/attack/none.yaml"),
    ]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fit", "-c"],
        ["fit", "--run", "purify/cbd", "purify/cbd"],
        ["fit", "--run=-c", "purify/cbd"],
        ["fit", "--model.config", "purify/cbd", "--model.config=purify/cbd"],
        ["fit", "-c", "{run: purify/cbd}", "--config=run: x"],  # YAML text
        ["config", "cat", "purify/cbd"],
    ],
)
def test_other_words_stay_as_they_are(words):
    assert with_paths(words) == words


def test_a_file_of_the_users_own_wins_and_a_folder_does_not():
    Path("purify").mkdir()
    Path("purify/cbd").write_text("run: mine")
    Path("data/cifar10").mkdir(parents=True)  # holds a data set
    assert path_of("purify/cbd", "-c") == "purify/cbd"
    assert path_of("data/cifar10", "-c") == f"{CONFIGS}/data/cifar10.yaml"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "attack/wanet",
            "-c attack/wanet: it is a folder of configs. Choose attack/wanet/advrbd, "
            "attack/wanet/bcu or attack/wanet/cbd.",
        ),
        ("measure/", "-c measure: it is a folder of configs. Choose measure/knn or measure/linear"),
        ("attack", "Choose attack/adaptive_blend, attack/adaptive_patch, attack/badnets, "),
        ("purify/cdb", "-c purify/cdb: there is no such file and no config of that name. Did you "),
        ("purify/cdb", "Did you mean purify/cbd"),
        ("configs/attack/badnets_bcu.yaml", "Did you mean attack/badnets/bcu"),
        ("../configs/purify/cbd", "no config of that name"),
        ("mine.yaml", "no config of that name. `bdclean config ls` lists all names."),
    ],
)
def test_what_is_said_of_other_names(name, said):
    with pytest.raises(ConfigError) as told:
        with_paths(["fit", "-c", name])
    assert said in str(told.value)
    assert str(told.value).endswith(".")


def test_a_file_that_hides_a_config_is_told_of_once(capsys):
    file = Path("data/digits")
    file.parent.mkdir()
    file.write_text("run: x")
    assert path_of("data/digits", "-c") == path_of("data/digits", "-c") == "data/digits"
    assert capsys.readouterr().err == (
        "-c data/digits: this is your file, not the config of that name.\n"
    )
    Path("mine.yaml").write_text("run: x")
    path_of("mine.yaml", "-c")
    assert capsys.readouterr().err == ""
