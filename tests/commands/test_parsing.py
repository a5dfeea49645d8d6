"""Wrong words of a command: one sentence with the option as it was typed."""

from pathlib import Path

import pytest

from bdclean.cli import main
from bdclean.commands import overview

BASE = ["fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "train/supervised/fast"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown.strip().removeprefix("bdclean: ")


NUMBERS = {
    ("--model.lr", "-1e-3"): "Supervised has no such option. Did you mean --model.optimizer.lr?",
    ("--model.optimizer.lr", "-1e-3"): "--model.optimizer: Invalid learning rate: -0.001.",
    ("--model.optimizer.lr", "-.inf"): "--model.optimizer: Invalid learning rate: -inf.",
    ("--model.optimizer.lr", "-inf"): "--model.optimizer.lr=-inf: it must be a finite number.",
    ("--model.optimizer.lr", "inf"): "--model.optimizer.lr=inf: it must be a finite number.",
    ("--model.optimizer.lr", "-NaN"): "--model.optimizer.lr=-NaN: it must be a finite number.",
    ("--model.width", "-5"): "--model.width=-5: it must be at least 1.",
    ("--model.width", "-5e1"): "--model.width=-5e1: it must be a whole number or null.",
    ("--model.gamma", "-.5"): "--model.gamma=-0.5: it must be ",
    ("--data.splits.val", "-1_0"): "--data.splits.val=-10: it must be ",
    ("--run", "-x"): "--run: a value must follow it.",
}


@pytest.mark.parametrize("words", NUMBERS, ids=" ".join)
def test_a_number_below_zero_is_a_value(words, capsys):
    said = refused([*BASE, *words], capsys)
    assert NUMBERS[words] in said
    assert said.startswith(words[0].removesuffix(".lr"))


@pytest.mark.parametrize("after", [[], ["--run", "x"]])
@pytest.mark.parametrize(
    "option",
    [
        *("--model", "--model.width", "--model.optimizer", "--model.optimizer.lr", "--run", "-c"),
        *("--config", "--data.splits.val", "--trainer.devices", "--data.attack"),
    ],
)
def test_the_option_without_a_value_is_named(option, after, capsys):
    assert refused([*BASE, option, *after], capsys) == f"{option}: a value must follow it."


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("rnu", "run"), ("urn", "run"), ("halp", "help"), ("hlep", "help"), ("hepl", "help")),
        *(("modle", "model"), ("dtaa", "data"), ("sede_everything", "seed_everything")),
    ],
)
def test_a_misspelt_option_gets_the_nearest_one(typed, meant, capsys):
    assert refused([*BASE, f"--{typed}", "x"], capsys) == (
        f"--{typed}: there is no such option. Did you mean --{meant}?"
    )


@pytest.mark.parametrize("name", ["own..X", ".X", "X.", ".", "..", "...", "own.X!", "1.X"])
@pytest.mark.parametrize("key", ["model", "data", "data.attack", "model.optimizer"])
def test_what_is_no_name_of_a_class_is_no_class(key, name, capsys):
    Path("own.py").touch()
    Path("X.py").touch()
    assert refused([*BASE, f"--{key}", name], capsys).startswith(
        f"--{key}={name}: there is no such class."
    )


@pytest.mark.parametrize("name", ["nope.Own", "torch.Nope"])
def test_a_class_is_missed_where_other_values_may_stand_too(name, capsys):
    said = refused([*BASE, "--trainer.logger", name], capsys)
    assert said == f"--trainer.logger={name}: there is no such class."


@pytest.mark.parametrize("command", [BASE, ["demo"], ["sift", "photos"]], ids=lambda w: w[0])
@pytest.mark.parametrize("run", ["x" * 300, "a/" + "é" * 200, "a/" + "x" * 256 + "/b"])
def test_a_folder_whose_name_is_too_long_is_refused(run, command, capsys):
    assert refused([*command, "--run", run], capsys) == (
        f"--run={run[:20]}...: a name in it has more than 255 bytes; shorten it."
    )


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("trainer: {default_root_dir: there}", "trainer.default_root_dir=there: {}"),
        ("checkpoint: {dirpath: there}", "checkpoint.dirpath=there: {}"),
        ("checkpoint: {filename: ../../x}", "checkpoint.filename=../../x: give the name of a fil"),
        ("checkpoint: {filename: /tmp/x}", "checkpoint.filename=/tmp/x: give the name of a file "),
        ("checkpoint: {filename: sub/x}", "checkpoint.filename=sub/x: give the name of a file al"),
        ("checkpoint: {filename: '{../x}'}", "checkpoint.filename={{../x}}: give the name of a f"),
    ],
)
@pytest.mark.parametrize("how", ["a file", "text", "an option", "a part", "a part in a file"])
def test_a_run_writes_into_its_folder_alone(how, text, rest, tmp_path, capsys):
    section, _, part = text.partition(": ")
    key, _, value = part.strip("{}").partition(": ")
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "part.yaml").write_text(part)
    words = {
        "a file": ["-c", "mine.yaml"],
        "text": ["-c", text],
        "an option": [f"--{section}.{key}", value.strip("'")],
        "a part": [f"--{section}", part],
        "a part in a file": [f"--{section}", "part.yaml"],
    }[how]
    if "'" in value and how == "an option":
        words[1] = "{../x}"
    said = refused([*BASE, *words], capsys)
    assert said.startswith("--" + rest.format("a run writes into one folder; name it with --run."))


def test_settings_that_name_no_folder_are_taken(capsys):
    words = ["--trainer.default_root_dir", "null", "--checkpoint.filename", "{epoch}-{val/acc:.2f}"]
    with pytest.raises(SystemExit) as stop:
        main([*BASE, *words, "--print_config"])
    assert stop.value.code == 0
    assert "filename: '{epoch}-{val/acc:.2f}'" in capsys.readouterr().out


def test_help_is_a_word_too(capsys):
    main(["help"])
    assert capsys.readouterr().out == f"{overview()}\n"
    for words in (["fit"], ["fit", "--model", "KNN"], ["config", "cat"]):
        shown = []
        for asked in (["help", *words], [*words, "--help"]):
            try:
                main(asked)
            except SystemExit as stop:
                assert stop.code == 0  # noqa: PT017
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1]
        assert shown[0].startswith(f"usage: bdclean {words[0]}")
    assert refused(["help", "fti"], capsys).startswith("fti is no command. Did you mean fit?")


def test_the_folder_of_a_config_changes_no_message(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("model: {init_args: {width: x}}")
    for words in (["-c", "sub/a.yaml"], ["--config=sub/a.yaml"], ["-c", "./sub/../sub/a.yaml"]):
        said = refused([*BASE, *words], capsys)
        assert said == "--model.width=x: it must be a whole number or null."
