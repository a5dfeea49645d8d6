"""What a command says at its end."""

import pytest

from bdclean.commands import closing

METRICS = {"acc": 93.1234, "asr": 1.5, "pa": 90.0, "n_clean": 10000, "n_triggered": 9000}


def record(metrics=METRICS, attack="BadNets", **protocol):
    data = {"attack": {"attack": attack} if attack else None, "sizes": {"train": 1000}}
    return {"metrics": metrics, "data": data, "protocol": {"head": "original"} | protocol}


def test_numbers_have_two_digits_and_their_counts():
    assert closing.measured(METRICS, "BadNets").splitlines() == [
        "Measured on test images:",
        "  ACC 93.12 % of 10,000, clean",
        "  ASR 1.50 % of 9,000 with the trigger of BadNets",
        "  PA  90.00 % of the same",
    ]


def test_further_test_sets_and_metrics_of_others_are_listed():
    text = closing.measured(METRICS | {"leak": 2.0, "n_leak": 30, "f1": 0.123456}, "TaCT")
    assert text.splitlines()[-2:] == ["  leak 2.00 % of 30", "  f1 0.1235"]


@pytest.mark.parametrize(
    ("attack", "why"),
    [(None, "the data has no attack"), ("TaCT", "no image counts for this attack")],
)
def test_what_is_not_measured_has_its_reason(attack, why):
    text = closing.measured({"acc": 50.0, "n_clean": 4, "n_triggered": 0}, attack)
    assert text.splitlines()[-1] == f"Not measured: ASR and PA, because {why}."


def test_files_that_are_there_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    for name in ("result.json", "model.safetensors", "notes.txt"):
        (run / name).touch()
    assert closing.written(run) == "Written to runs/mine: model.safetensors, result.json"


@pytest.mark.parametrize(
    ("facts", "after"),
    [
        (
            record(),
            "bdclean fit -c run/config.yaml -c purify/cbd --model.weights run/model.safetensors "
            "--run run-cbd",
        ),
        (record(purified=True), "bdclean figure tsne run --out run/tsne.png"),
        (record(head="probe"), "bdclean figure tsne run --out run/tsne.png"),
        (
            record(head="none", purified=True),
            "bdclean fit -c run/config.yaml -c measure/linear_probe --model.weights "
            "run/model.safetensors --run run-probe",
        ),
        (
            record(attack=None),
            "bdclean predict -c run/config.yaml --ckpt_path run/checkpoints/last.ckpt",
        ),
        (record(purified=False), "bdclean fit -c a b --ckpt_path last  (without what stopped it)"),
        (record() | {"identification": {}}, "look at run/suspects.png"),
    ],
    ids=["victim", "purified", "probed", "backbone", "no attack", "cut short", "sifted"],
)
def test_the_next_command(facts, after):
    words = ["-c", "a", "b", "--ckpt_path", "last"]
    assert closing.next_command(facts, closing.Path("run"), words) == after


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "a", "--run", "my runs/x"],
        ["-c", "a", "--ckpt_path", "old.ckpt", "--run", "my runs/x"],
        ["-c", "a", "--ckpt-path=old.ckpt", "--run", "my runs/x"],
        ["-c", "a", "--run", "my runs/x", "--ckpt_path"],
    ],
)
def test_a_fit_goes_on_with_its_own_words(words):
    told = closing.command("fit", closing.going_on(words))
    assert told == "bdclean fit -c a --run 'my runs/x' --ckpt_path last"
