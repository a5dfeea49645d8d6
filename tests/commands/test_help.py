"""The help of every command and class: one style, and the values that configs give."""

import re
from pathlib import Path

import pytest

from bdclean import shipped
from bdclean.cli import main
from bdclean.commands import COMMANDS, class_help, help_page
from bdclean.commands.rooms import BASES, base_of, classes_of
from bdclean.errors import ConfigError

PAGES = [[name] for name in COMMANDS] + [
    *(["attack", "preview"], ["attack", "export"], ["figure", "tsne"]),
    *(["config", "ls"], ["config", "cat"], ["config", "cp"]),
]
CLASSES = [(key, name) for key in BASES for name in classes_of(base_of(key))]


def shown(capsys, *words):
    try:
        main(words)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # noqa: PT017
    return capsys.readouterr().out


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_all_commands_have_one_style(capsys, words):
    text = shown(capsys, *words, "--help")
    parts = text.strip().split("\n\n")
    assert parts[0].startswith(f"usage: bdclean {' '.join(words)}")
    assert parts[1][0].isupper()
    assert parts[1].endswith(".")
    assert parts[-2].startswith(f"Example: bdclean {words[0]}")
    assert Path(re.match(r"More: ([^;]+)", parts[-1])[1]).is_file()
    assert max(map(len, text.splitlines())) <= 100
    assert "%(" not in text
    assert "(type:" not in text
    example = parts[-2].replace("\\\n", " ")
    given = re.findall(r"-c (\S+)", example)
    assert set(given) <= set(shipped.names())


def test_pages_are_named_by_paths_that_open_them(capsys, monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    assert shown(capsys, "--help").endswith("More: docs/getting_started.md\n")
    assert shown(capsys, "check", "--help").endswith("More: docs/how_to/check.md\n")
    monkeypatch.chdir(tmp_path)
    assert shown(capsys, "--help").endswith(f"More: {root / 'docs/getting_started.md'}\n")
    assert shown(capsys, "methods").endswith(f"in\n{root / 'docs/concepts.md'}.\n")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "bdclean/shipped.py"))
    (tmp_path / "bdclean/docs").mkdir(parents=True)
    (tmp_path / "bdclean/docs/concepts.md").write_text("")
    assert shipped.page("docs/concepts.md") == "bdclean/docs/concepts.md"


def test_the_example_of_a_fit_plants_a_backdoor_that_works(capsys):
    told = Path(__file__).parents[2] / "docs/getting_started.md"
    commands = " ".join(told.read_text().replace("\\\n", " ").split())
    example = re.search(r"Example: (.*?)\n\n", shown(capsys, "fit", "--help"), re.DOTALL)[1]
    assert " ".join(example.replace("\\\n", " ").split()) in commands


@pytest.mark.parametrize(("key", "name"), CLASSES, ids=lambda value: value)
def test_the_options_of_a_class_have_the_names_that_users_type(capsys, key, name):
    text = shown(capsys, "fit", f"--{key}.help", name)
    assert text.startswith(f"usage: bdclean fit --{key} {name} [--{key}.KEY VALUE ...]\n")
    options = re.findall(r"^  (--\S+)", text, re.MULTILINE)
    assert options
    assert all(option.startswith(f"--{key}.") for option in options)
    assert not [option for option in options if option.startswith(("--data.view", "--model.facts"))]
    assert not [option for option in options if option.endswith((".help", ".class_path"))]
    assert "%(" not in text
    assert "None" not in text
    assert "Of eq." not in text
    assert shown(capsys, "fit", f"--{key}.help={name}") == text


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--model.optimizer.help", "SGD"], ["--model.optimizer.lr", "--model.optimizer.momentum"]),
        (["-c", "purify/cbd", "--model.probe.help"], ["--model.probe.solver"]),
        (["--model", "CBD", "--model.projection.help"], ["--model.projection.dim"]),
        (["--trainer.logger.help", "CSVLogger"], ["--trainer.logger.save_dir"]),
        (["-c", "data/cifar100", "--data.help"], ["--data.root", "cifar-100-python"]),
    ],
)
def test_other_classes_and_groups_are_told_of_alike(capsys, words, options):
    text = shown(capsys, "fit", *words)
    assert not [option for option in options if option not in text]
    assert "--model.optimizer.params" not in text


def test_commands_of_data_have_the_same_help_of_classes(capsys):
    text = shown(capsys, "attack", "preview", "--data.attack.help", "SIG")
    assert text.startswith("usage: bdclean attack preview --data.attack SIG ")
    assert "--data.attack.delta X" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.attack.help"], "--data.attack.help: a class must follow it, one of Adaptive"),
        (["--data.help", "Foo"], "--data.help=Foo: there is no such class. Known are CIFAR10, "),
        (["--model.help", "CBDD"], "--model.help=CBDD: there is no such class. Did you mean CBD?"),
        (["--model.help=Purifier"], "--model.help=Purifier: it is a base class, so that nothing "),
        (["--model.probe.help"], "--model.probe.help: name the class first, with --model CLASS"),
    ],
)
def test_a_class_that_is_not_there_has_no_help(words, said):
    with pytest.raises(ConfigError) as told:
        class_help.class_page("fit", words)
    assert str(told.value).startswith(said)


CONFIGURED = ["-c", "trainer/cpu", "-c", "data/digits", "-c", "attack/badnets/cbd"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data.attack.target", "6"),
        ("--data.attack.position", "top_left"),
        ("--data.attack", "BadNets"),
        ("--data.splits.defense", "300"),
        ("--model.recipe.epochs", "5"),
        ("--model.recipe.schedule", "cosine"),
        ("--model.temperature", "0.5"),
        ("--trainer.accelerator", "cpu"),
        ("--run", "runs/mine"),
    ],
)
def test_a_default_is_what_the_configs_say(tmp_path, capsys, option, value):
    mine = tmp_path / "mine.yaml"
    mine.write_text("run: runs/mine\n")
    text = shown(capsys, "fit", *CONFIGURED, "-c", "purify/cbd/fast", "-c", str(mine), "--help")
    row = text[re.search(rf"^  {option} ", text, re.MULTILINE).end() :]
    row = re.split(r"\n  -|\n\n", row)[0]
    assert re.findall(r"\(default: (.*?)\)", " ".join(row.split())) == [value]


@pytest.mark.parametrize("how", ["option", "config"])
@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("model", "CBDD", "there is no such class. Did you mean CBD?"),
        ("model", "nope", "there is no such class. Known are ABL, "),
        ("data", "digts.Digits", "there is no such class. Did you mean Digits?"),
        ("data", "torch.nn.Linear", "it is no LightningDataModule. Known are CIFAR10, "),
        ("model", "Purifier", "it is a base class, so that nothing can be made of it; choose BCU,"),
    ],
)
def test_there_is_no_help_of_a_class_that_is_not_there(key, name, said, how, capsys):
    named = [f"--{key}", name] if how == "option" else ["-c", f"{key}: {{class_path: {name}}}"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *named, "--help"])
    assert capsys.readouterr().err.startswith(f"bdclean: --{key}={name}: {said}")


@pytest.mark.parametrize("value", ["null", "{class_path: BadNets}", "BadNets"])
def test_an_attack_may_be_named_in_any_way(value, capsys):
    words = ["fit", "-c", "data/digits", "--data.attack", value, "--help"]
    assert ("--data.attack.pattern" in shown(capsys, *words)) == (value != "null")


def test_a_later_config_wins(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {init_args: {temperature: 0.25, probe: null}}\n")
    text = shown(capsys, "fit", "-c", "purify/cbd", "-c", str(mine), "--help")
    assert "tau of l_cl. (default: 0.25)" in text
    assert "null gives a product without a head. (default: null)" in " ".join(text.split())


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_what_means_nothing_without_training_is_not_shown(capsys, command):
    text = shown(capsys, command, *CONFIGURED, "-c", "purify/cbd", "--help")
    for option in (
        *("--model.recipe", "--model.pgd", "--model.probe", "--trainer.max_epochs"),
        *("--seed_everything", "--test_after_fit", "--data.defense_root", "--data.attack.rate"),
    ):
        assert option not in text
    for option in ("--model.weights", "--data.eval_batch_size", "--data.attack.target", "--run"):
        assert option in text
    assert ("--data.splits.val" in text) == (command == "validate")
    assert "--model.k X" in shown(capsys, command, "--model", "KNN", "--help")


def test_values_are_shown_as_they_are_typed():
    assert help_page.shown(None) == "null"
    assert help_page.shown(True) == "true"
    assert help_page.shown((0.5, 0.75)) == "[0.5, 0.75]"
    assert help_page.shown({"solver": "sgd", "recipe": {"lr": 0.1}}) == (
        "{solver: sgd, recipe: {lr: 0.1}}"
    )
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "nesterov": False}}
    assert help_page.shown(optimizer) == "SGD with lr: 0.1, nesterov: false"
