"""Configs that are odd: one sentence that names the file, the line and the key."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from bdclean.cli import main
from bdclean.commands.words import expanded

BASE = ["fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "train/supervised/fast"]
BILLION = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(8 * [f'*{before}'])}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)
pytestmark = pytest.mark.filterwarnings("ignore")
KEYS = "it must hold keys and values, as `run: runs/mine`."
PLAIN = "a config holds text, numbers, lists and mappings alone."
TEXTS = {
    "an empty file": ("", KEYS),
    "a list": ("- 1\n- 2\n", KEYS),
    "a number": ("3\n", KEYS),
    "a key that is a number": ("1: 2\n", "the key 1 is no name of an option; "),
    "a key that is null": ("null: 2\n", "the key null is no name of an option; "),
    "a key that is a list": ("? [a, b]\n: 1\n", "line 1: a list or a mapping is no key."),
    "a key that is empty": ("trainer: {'': 1}\n", "line 1 has a key without a name."),
    "a key of dots": ("'..': 1\n", "line 1 has a key without a name."),
    "a list in itself": ("&a [*a]\n", "the value that begins in line 1 holds itself."),
    "a value in itself": (
        "run: x\ntrainer: &a\n  callbacks: [*a]\n",
        "begins in line 2 holds itself.",
    ),
    "a key twice": ("run: a\nrun: b\n", "line 2 has the key run a second time."),
    "an inner key twice": (
        "trainer:\n  max_epochs: 1\n  max_epochs: 2\n",
        "line 3 has the key max_epochs a second time.",
    ),
    "twice in braces": ("trainer: {a: 1, a: 2}\n", "line 1 has the key a a second time."),
    "tabs": ("trainer:\n\tmax_epochs: 1\n", "it is no YAML (line 2: found character "),
    "two documents": ("a: 1\n---\nb: 2\n", "it is no YAML (line 2: "),
    "an unknown anchor": ("trainer: *x\n", "it is no YAML (line 1: found undefined alias"),
    "a null byte": ("run: \0\n", "line 1 holds the character 0x0000, which is none of YAML."),
    "an object": (
        "trainer: !!python/object:os.system {}\n",
        f"line 1 asks for !!python/object:os.system; {PLAIN}",
    ),
    "a call": (
        "a: !!python/object/apply:os.system [id]\n",
        f"line 1 asks for !!python/object/apply:os.system; {PLAIN}",
    ),
    "a tag of its own": ("trainer: !mine 3\n", f"line 1 asks for !mine; {PLAIN}"),
    "brackets": (f"trainer: {'[' * 10_000}\n", "it is nested more than 50 levels deep."),
    "braces": ("{a: " * 3000 + "1" + "}" * 3000, "it is nested more than 50 levels deep."),
    "aliases of aliases": (BILLION, "it holds more than 100,000 values."),
    "a huge number": (f"run: {'9' * 5000}\n", "it holds a number or date that nobody can read."),
    "a 13th month": ("run: 2020-13-45\n", "it holds a number or date that nobody can read."),
    "no date": ("run: !!timestamp 3\n", "it holds a number or date that nobody can read."),
    "half a character": ('run: "\\ud800"\n', "line 1 holds half a character."),
    "a merge of text": ("<<: 3\n", "it is no YAML (line 1: expected a mapping or list of mappings"),
    "itself": ("config: odd.yaml\n", "config=odd.yaml: a config cannot hold itself."),
    "itself as data": ("data: ./odd.yaml\n", "data=./odd.yaml: a config cannot hold itself."),
    "itself as a part": (
        "trainer: {logger: odd.yaml}\n",
        "trainer.logger=odd.yaml: a config cannot hold itself.",
    ),
    "ten megabytes": (
        "run: x\n# " + "x" * 10_000_000,
        "it is larger than 128 kB, as no config is.",
    ),
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)


def told(words, capsys):
    began = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert time.perf_counter() - began < 4
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown.strip()


@pytest.mark.parametrize("case", TEXTS, ids=list(TEXTS))
def test_an_odd_config_is_told_by_file_and_line(case, capsys):
    text, message = TEXTS[case]
    Path("odd.yaml").write_text(text)
    said = told([*BASE, "-c", "odd.yaml"], capsys)
    assert said.startswith("bdclean: -c odd.yaml: ")
    assert message in said


@pytest.mark.parametrize("option", ["-c", "--model", "--trainer"])
@pytest.mark.parametrize(
    "content", ["run: gr\xfc\xdf".encode("latin-1"), "run: x".encode("utf-16")]
)
def test_a_config_that_is_not_utf8_is_named(option, content, capsys):
    Path("odd.yaml").write_bytes(content)
    said = told([*BASE, option, "odd.yaml"], capsys)
    assert said == f"bdclean: {option} odd.yaml: it is no text in UTF-8, and so no config."


def test_what_is_no_file_is_named(capsys):
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save("picture.png")
    Path("folder").mkdir()
    for name, message in {
        "picture.png": "it is no text in UTF-8, and so no config.",
        "folder": "it is a folder; give a config file.",
        "/dev/zero": "it is no file; give a config file.",
    }.items():
        assert told([*BASE, "-c", name], capsys) == f"bdclean: -c {name}: {message}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "[1]"], f"-c: {KEYS}"),
        (["-c", ""], f"-c: {KEYS}"),
        (["-c", "{run: a, run: b}"], "-c: line 1 has the key run a second time."),
        (["--model.view", "{a: 1, a: 2}"], "--model.view: line 1 has the key a a second time."),
        (["--trainer.devices", "[" * 10_000], "--trainer.devices: it is nested more than 50"),
        (
            ["--trainer.callbacks", "&a [*a]"],
            "--trainer.callbacks: the value that begins in line 1",
        ),
    ],
)
def test_yaml_among_the_words_is_looked_at_too(words, message, capsys):
    assert told([*BASE, *words], capsys).startswith(f"bdclean: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: [1]\n", "--trainer=[1]: set its options one by one"),
        ("trainer: 3\n", "--trainer=3: set its options one by one"),
        ("trainer: null\n", "--trainer=null: set its options one by one"),
        ("subcommand: fit\n", "--subcommand: there is no such option."),
        ("fit:\n  run: x\n", "--fit.run: there is no such option."),
        ("trainer:\n  1: 2\n", "1: a key of a config is the name of an option"),
        ("model:\n  init_args: [1]\n", "--model: its init_args must hold keys and values."),
        ("model:\n  class_path: [1]\n", "--model: its class_path must be the name of a class."),
        ("'tr\\nainer': 1\n", "--tr"),
        ('"a\\e[31mb": 1\n', "--a\\x1b[31mb: there is no such option."),
        (
            "trainer: {callbacks: ['lambda x: 1']}\n",
            "--trainer.callbacks=['lambda x: 1']: there is",
        ),
        (
            "trainer: {callbacks: [{class_path: builtins.eval}]}\n",
            "--trainer.callbacks=builtins.eval: there is no such class.",
        ),
        ("model: os.system\n", "--model=os.system: there is no such class. Known are ABL"),
        ("model: {class_path: os.system}\n", "--model=os.system: there is no such class. Known"),
        ("model: {class_path: os}\n", "--model=os: there is no such class. Known are ABL"),
        ("model: {class_path: bdclean.modules._x}\n", "--model=bdclean.modules._x: there is no"),
        ("model: {class_path: 3}\n", "--model: its class_path must be the name of a class."),
        ("model: {class_path: null}\n", "--model: its class_path must be the name of a class."),
        ("trainer: {callbacks: [os.system]}\n", "--trainer.callbacks=['os.system']: there is no"),
        ("trainer: {callbacks: {class_path: 3}}\n", "--trainer.callbacks: its class_path must be"),
        ("checkpoint: [1]\n", "--checkpoint=[1]: set its options one by one"),
        ("checkpoint: text\n", "--checkpoint=text: set its options one by one"),
        ("help: true\n", "--help: there is no such option. The command's --help lists the opti"),
        ("run: !!binary aGk=\n", "--run=b'hi': it must be text."),
        ("trainer: {max_epochs: 1.5}\n", "--trainer.max_epochs=1.5: it must be a whole number"),
        ("seed_everything: 99999999999999999999\n", "--seed_everything=99999999999999999999: it m"),
        ("ckpt_path: 3\n", "--ckpt_path=3: it must be text or null."),
        ("run: [1]\n", "--run=[1]: it must be text."),
        ("run: null\n", "--run=null: it must be text."),
    ],
)
def test_an_odd_value_in_a_config_is_told_by_its_key(text, message, capsys):
    Path("odd.yaml").write_text(text)
    assert told([*BASE, "-c", "odd.yaml"], capsys).startswith(f"bdclean: {message}")


@pytest.mark.parametrize("value", ["[1]", "3", "text", "null"])
@pytest.mark.parametrize("key", ["model", "data", "trainer", "data.attack", "model.init_args"])
def test_odd_settings_of_a_former_method_are_no_traceback(key, value, capsys):
    first, _, rest = key.partition(".")
    inner = f"{{class_path: bdclean.purification.CBD, {rest}: {value}}}" if rest else value
    Path("odd.yaml").write_text(f"{first}: {inner}\n")
    words = ["fit", "-c", "odd.yaml", *BASE[1:], "--model.widht", "4", "--run", "run"]
    assert told(words, capsys).startswith("bdclean: --")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "it holds more than 100,000 values."),
        ("default_root_dir: there\n", "a run writes into one folder; name it with --run."),
        ("a: !mine 3\n", f"line 1 asks for !mine; {PLAIN}"),
        ("trainer: ../sub/inner.yaml\n", "a config cannot hold itself."),
    ],
)
def test_files_that_a_config_names_are_looked_at_too(text, message, capsys):
    Path("sub").mkdir()
    Path("outer.yaml").write_text("trainer: sub/inner.yaml\n")
    Path("sub/inner.yaml").write_text(text)
    assert told([*BASE, "-c", "outer.yaml"], capsys).endswith(message)


def test_a_config_may_be_text_that_is_longer_than_any_name():
    text = "trainer:\n" + "".join(f"  key_{n}: {n}\n" for n in range(1000))
    assert expanded(["fit", "-c", text]) == ["fit", "-c", text]


def piped(content):
    """A pipe as the shell makes for `-c <(command)`: its content can be read once."""
    Path("pipe").unlink(missing_ok=True)
    os.mkfifo("pipe")
    Thread(target=Path("pipe").write_bytes, args=[content], daemon=True).start()
    return "pipe"


@pytest.mark.parametrize("option", ["-c", "--config="])
def test_a_pipe_is_read_once_and_its_text_stands_for_it(option, capsys):
    text = "---\ndata: {init_args: {eval-batch-size: x}}\n"
    words = [option + piped(text.encode())] if "=" in option else [option, piped(text.encode())]
    with suppress(SystemExit):
        main([*BASE, *words])
    assert "--data.eval-batch-size" in capsys.readouterr().err  # the text stays as it is
    with pytest.raises(SystemExit):
        main([*BASE, "-c", piped(b"run: mine\nseed_everything: 5\n"), "--print_config"])
    shown = capsys.readouterr().out
    assert "\nrun: mine\n" in shown
    assert "seed_everything: 5" in shown


def test_processes_of_a_run_start_with_the_text_of_a_pipe(monkeypatch, capsys):
    words = [*BASE, "-c", piped(b"run: mine"), "--print_config"]
    monkeypatch.setattr("sys.argv", ["bdclean", *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert sys.argv == ["bdclean", *BASE, "-c", "run: mine", "--print_config"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"-c: {KEYS}"),
        (b"- 1\n- 2\n", f"-c: {KEYS}"),
        (b"run: a\nrun: b\n", "-c: line 2 has the key run a second time."),
        (b"run: gr\xfc\xdf", "-c pipe: it is no text in UTF-8, and so no config."),
        (b"run: x\n# " + b"x" * 10_000_000, "-c: it is larger than 128 kB, as no config is."),
    ],
)
def test_an_odd_pipe_is_told(content, message, capsys):
    assert told([*BASE, "-c", piped(content)], capsys) == f"bdclean: {message}"


def test_a_folder_may_have_a_name_that_begins_like_yaml(capsys):
    said = told([*BASE, "--model.weights", "[old"], capsys)
    assert said == "bdclean: --model.weights [old: there is no such weights file."
