"""What a command says at its end."""

import pytest

from bdclean.commands import closing

METRICS = {"acc": 93.1234, "asr": 1.5, "pa": 90.0, "n_clean": 10000, "n_triggered": 9000}

SIZES = {"train": 1000, "defense": 300, "probe": 100}


def record(metrics=METRICS, attack="BadNets", **protocol):
    data = {"attack": {"attack": attack} if attack else None, "sizes": SIZES}
    return {"metrics": metrics, "data": data, "protocol": {"head": "original"} | protocol}


def test_numbers_have_two_digits_and_their_counts():
    assert closing.measured(METRICS, "BadNets").splitlines() == [
        "Measured on test images:",
        "  ACC 93.12 % of 10,000, clean",
        "  ASR 1.50 % of 9,000 with the trigger of BadNets",
        "  PA  90.00 % of the same",
    ]


def test_the_floor_of_asr_stands_beside_it():
    lines = closing.measured(METRICS | {"asr_floor": 0.25}, "BadNets").splitlines()
    assert lines[2] == "  ASR 1.50 % of 9,000 with the trigger of BadNets; 0.25 % without it"
    assert len(lines) == 4


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


def test_the_record_of_an_earlier_test_is_not_of_this_fit(run):
    for name in ("result.json", "test.json"):
        (run / name).touch()
    facts = record(method="supervised")
    told = "Written to run: model.safetensors, result.json"
    assert closing.after_fit(facts, run, [])[0] == told
    assert closing.after_test(facts, run, [])[0] == "Written to run: test.json"


PREDICT = "bdclean predict --run run"
LOAD = (
    "python -c 'from bdclean.backbones import load_model; "
    """print(load_model("run/model.safetensors"))'"""
)


def after(facts, **settings):
    words = ["-c", "a", "b", "--ckpt_path", "last"]
    return closing.next_command(facts, closing.Path("run"), words, **settings)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with weights and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for file in ("model.safetensors", "checkpoints/last.ckpt"):
        place = tmp_path / "run" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (
            record(method="supervised"),
            "bdclean fit -c run/config.yaml -c purify/cbd --model.weights run/model.safetensors "
            "--run run-cbd",
        ),
        (record(finished=True), "bdclean figure tsne run --out run/tsne.png"),
        (record(head="probe"), "bdclean figure tsne run --out run/tsne.png"),
        (record(method="clean part"), "bdclean figure tsne run --out run/tsne.png"),
        (
            record(head="none", finished=True),
            "bdclean fit -c run/config.yaml -c measure/linear_probe --model.weights "
            "run/model.safetensors --run run-probe",
        ),
        (record(attack=None), PREDICT),
        (record(attack=None, finished=True), PREDICT),
        (record(finished=False), "bdclean fit -c a b --ckpt_path last"),
        (record(finished=True) | {"identification": {}}, "bdclean figure tsne run --out"),
        (record(attack=None) | {"identification": {}}, PREDICT),
        (record() | {"protocol": {}}, PREDICT),
    ],
    ids=[
        *("victim", "finished", "probed", "bound", "backbone", "no attack", "finished clean"),
        *("cut short", "sifted", "sifted clean", "of another package"),
    ],
)
def test_the_next_command(facts, told, run):
    assert after(facts).startswith(told)


def test_a_run_that_was_asked_for_scores_and_no_more_has_nothing_to_go_on_with(run):
    assert after(record(finished=True, retrained=False)) is None
    assert after(record(finished=False, retrained=False)) == "bdclean fit -c a b --ckpt_path last"


def test_a_run_on_photos_is_used_because_nothing_measures_it(run):
    for facts in (record(attack=None, head="none", finished=True), record(attack=None)):
        assert after(facts, tests=False) == LOAD
    (run / "checkpoints/last.ckpt").unlink()
    assert after(record(attack=None)) == LOAD
    (run / "model.safetensors").unlink()
    assert after(record(attack=None)) is None


@pytest.mark.parametrize(
    ("name", "sizes", "method"),
    [
        ("digits", {"defense": 300, "probe": 100}, "purify/cbd/digits"),
        ("imagenet100", {"defense": 300, "probe": 100}, "purify/cbd/imagenet100"),
        ("cifar10", {"defense": 2500, "probe": 500}, "purify/cbd"),
        ("cifar10", {"defense": 2500, "probe": 0}, "purify/bcu"),
        ("cifar10", {"defense": 100, "probe": 500}, "purify/bcu"),
        ("cifar10", {"defense": 0, "probe": 0}, None),
    ],
)
def test_the_purification_of_a_victim_has_the_images_that_it_needs(name, sizes, method, run):
    facts = record(method="supervised")
    facts["data"] |= {"name": name, "sizes": sizes}
    told = after(facts)
    assert told.startswith("bdclean figure tsne" if method is None else "bdclean fit -c run/conf")
    assert method is None or f" -c {method} " in told


@pytest.mark.parametrize(
    ("asr", "method", "attack", "told"),
    [
        (3.0, "supervised", {"rate": 0.06, "patch_size": 3}, "--data.attack.patch_size or more"),
        (49.9, "input_aware", {"rate": 0.1}, "--data.attack.rate, another trigger or more epochs"),
        (50.0, "supervised", {"rate": 0.06}, None),
        (3.0, "clean part", {"rate": 0.06}, None),
        (3.0, "cbd", {"rate": 0.06}, None),
    ],
)
def test_a_backdoor_that_was_not_planted_is_told_in_one_sentence(asr, method, attack, told, run):
    facts = record(METRICS | {"asr": asr}, method=method)
    facts["data"]["attack"] |= attack
    said = [line for line in closing.after_fit(facts, run, []) if "hardly learned" in line]
    assert len(said) == (told is not None)
    for line in said:
        assert told in line
        assert line.startswith("The backdoor was hardly learned (ASR below 50 %): try a larger ")
        assert line.count(". ") == 0


@pytest.mark.parametrize(
    ("words", "trainer", "on"),
    [
        (["--trainer.max_steps", "2", "--run", "x"], {"max_steps": 2}, "--trainer.max_steps -1"),
        (["--trainer.max-time=00:00:01:00", "--run", "x"], {"max_time": "1"}, "max_time null"),
        (["-c", "limit.yaml", "--run", "x"], {"max_steps": 2}, "--trainer.max_steps -1"),
        (["--run", "x"], {"max_steps": -1, "max_time": None}, "--trainer.callbacks null"),
    ],
    ids=["steps", "time", "in a file", "a callback"],
)
def test_a_fit_goes_on_without_what_stopped_it(words, trainer, on):
    told = closing.command("fit", closing.unlimited(words, trainer))
    assert told.endswith(f"{on} --ckpt_path last")
    assert "--run x" in told
    assert "max_steps 2" not in told
    assert "00:00:01:00" not in told


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


def test_what_was_seen_without_labels_is_told(run):
    seen = {"before": {"flipped": 0.75, "share": 0.8, "favourite": 6}}
    seen["after"] = {"flipped": 0.2, "share": 0.25, "favourite": 1}
    facts = record(method="shortcut", agreement=0.976, concentration={"patch": seen})
    assert closing.after_fit(facts | {"metrics": {}}, run, [], "Nothing was measured.")[1:4] == [
        "Nothing was measured.",
        "Without labels, on images held out: 97.60 % of the answers are those of the suspect.",
        "  under patch perturbations, before: 75 % of the answers change, 80 % of these to class "
        "6; now: 20 % of the answers change, 25 % of these to class 1",
    ]
    facts = record(method="shortcut", head="none", feature_cosine=0.9876, concentration={})
    told = closing.after_fit(facts | {"metrics": {}}, run, [], "Nothing was measured.")
    assert "features have a cosine of 0.988 with those of the suspect." in told[2]


def test_a_classifier_that_was_cleaned_with_photos_is_checked_next(run):
    config = "data:\n  init_args:\n    defense_root: my photos\n"
    (run / "config.yaml").write_text(config)
    facts = record(attack=None, finished=True)
    wanted = "bdclean check run/model.safetensors 'my photos'"
    assert after(facts, tests=False) == wanted
    assert after(record(attack=None, head="none", finished=True), tests=False) == LOAD
