"""The help of a Trainer command: short, the method's own options first."""

import pytest

from bdclean.cli import main

HIDDEN = ("--model.facts", "--data.view", "--trainer.barebones")


def shown(capsys, *words):
    main([*words, "--help"])
    return capsys.readouterr().out


def test_without_a_method_it_names_those_there_are(capsys):
    text = shown(capsys, "fit")
    assert len(text.splitlines()) <= 40
    assert "CBD" in text
    assert "Digits" in text
    assert "--ckpt_path" in text


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "CBD", "--data=Digits", "--data.attack", "BadNets"],
        ["-c", "purify/cbd", "-c", "data/digits", "-c", "attack/badnets/cbd"],
        ["-c", "purify/bcu", "-c", "data/digits", "--data.attack=BadNets", "--model", "CBD"],
        ["--model.class_path=bdclean.purification.CBD", "--data", "Digits"],
    ],
    ids=["words", "configs", "a word wins", "an import path"],
)
def test_the_options_of_the_chosen_classes_come_first(capsys, words):
    text = shown(capsys, "fit", *words)
    lines = text.splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 100
    method, data = text.index("CBD: "), text.index("Digits: ")
    assert method < text.index("--model.lambda_pull") < data < text.index("--data.splits.defense")
    assert data < text.index("--trainer.precision") < text.index("--help_all")
    if "attack" in " ".join(words):
        assert "--data.attack.patch_size" in text
    assert not [option for option in HIDDEN if option in text]


def test_all_options_are_those_of_lightning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help_all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--trainer.barebones" in text
    assert "--checkpoint.save_top_k" in text


def test_other_commands_have_it_too(capsys):
    assert "usage: bdclean test" in shown(capsys, "test", "--model", "CBD")
