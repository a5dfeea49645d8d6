"""The command line as a user meets it, in one process on the digits."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file

import bdclean
from bdclean.backbones import load_model
from bdclean.callbacks.products import OF_FIT
from bdclean.cli import main
from bdclean.commands import COMMANDS, lightning

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore")


def stack(*names):
    return [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]


BASE = stack("trainer/cpu", "data/digits", "attack/badnets/cbd")
# The stem brings the digits back to the 8x8 pixels that they have, which is quick.
SMALL = ("--model.width", "4", "--model.stem", "imagenet")
QUICK = {
    "train/supervised/fast": [*SMALL, "--trainer.max_epochs", "1"],
    "measure/linear_probe": ["--model.probe.solver", "lbfgs"],
    "purify/cbd": [
        *("--model.recipe.epochs", "1", "--model.pgd.steps", "2"),
        *("--model.probe.solver", "lbfgs"),
    ],
    "purify/bcu": ["--model.recipe.epochs", "1"],
    "sift/advrbd/fast": [
        *(*SMALL, "--model.recipe.epochs", "1", "--model.rounds.count", "1"),
        *("--model.patch.pgd.steps", "1", "--model.patch.num_masks", "1"),
        *("--model.finetune.epochs", "1", "--model.rounds.ascent_steps", "8"),
        *("--model.enhance_steps", "4"),
    ],
    "sift/abl/fast": [
        *(*SMALL, "--model.isolation.epochs", "1"),
        *("--model.recipe.epochs", "1", "--model.unlearning.epochs", "1"),
    ],
    "sift/dbr/fast": [
        *(*SMALL, "--model.warm.epochs", "1", "--model.separate.epochs", "1"),
        *("--model.recipe.epochs", "1", "--model.removal.epochs", "1"),
    ],
    "sift/scan": [
        *(*SMALL, "--model.recipe.epochs", "1", "--model.components", "8"),
        *("--model.threshold", "0.5", "--model.unlearn.epochs", "1"),
    ],
}
# They start without a weights file.
FROM_DATA = {"sift/advrbd/fast", "sift/abl/fast", "sift/dbr/fast", "sift/scan"}


def fit(run, method, *extra):
    main(["fit", *BASE, *stack(method), *QUICK[method], "--run", str(run), *extra])
    return json.loads((run / "result.json").read_text())


def test_words_of_the_process_cause_no_warning(monkeypatch):
    words = ["fit", *BASE, *stack("train/supervised/fast"), "--print_config"]
    monkeypatch.setattr("sys.argv", ["bdclean", *words])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert not [w for w in told if "sys.argv" in str(w.message)]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "victim"
    fit(run, "train/supervised/fast")
    return run


HEAVY = ("torch", "lightning", "matplotlib", "jsonargparse")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_one_help_lists_every_command(capsys, words):
    main(words)
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.does)}$", shown, re.MULTILINE)


def test_every_command_of_the_table_is_there():
    assert all(callable(command.load()) for command in COMMANDS.values())


@pytest.mark.parametrize(
    ("words", "status"), [("['--help']", 0), ("['--version']", 0), ("['fit', '-c', 'no']", 2)]
)
def test_what_needs_no_model_imports_nothing_heavy(run_python, words, status):
    text = (
        f"import sys\nfrom bdclean.cli import main\ntry:\n    main({words})\n    status = 0\n"
        f"except SystemExit as stop:\n    status = stop.code\n"
        f"print('loaded', status, [m for m in {HEAVY} if m in sys.modules])"
    )
    assert run_python("-c", text).splitlines()[-1] == f"loaded {status} []"


def test_a_refused_fit_imports_what_it_needs(run_python):
    """Each of these takes a part of a second or more, for nothing."""
    text = (
        "import sys\nfrom bdclean.cli import main\n"
        "try:\n    main(['fit', '--model', 'CBD', '--model.epsilom', '3'])\n"
        "except SystemExit as stop:\n    assert stop.code == 2\n"
        "heavy = ('matplotlib', 'sklearn', 'timm', 'lightly', 'scipy.signal', 'scipy.stats')\n"
        "print([m for m in heavy if m in sys.modules])\n"
        "import matplotlib.pyplot, scipy.signal\n"
        "print(scipy.signal.windows.hamming(2).shape)"
    )
    assert run_python("-c", text).splitlines() == ["[]", "(2,)"]


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == f"bdclean {bdclean.__version__}"


def test_a_run_folder_is_complete(victim):
    names = {path.name for path in victim.iterdir()}
    assert names >= {
        "config.yaml",
        "result.json",
        "model.safetensors",
        "plan.safetensors",
        "plan.json",
        "trigger.safetensors",
        "metrics.csv",
        "checkpoints",
    }
    record = json.loads((victim / "result.json").read_text())
    assert record["metrics"]["n_clean"] == 397
    assert record["metrics"]["n_triggered"] == 361
    assert record["data"]["sizes"]["train"] == 1000
    assert record["data"]["plan_hash"] == json.loads((victim / "plan.json").read_text())["hash"]
    assert record["protocol"]["head"] == "original"
    assert record["cost"]["train_seconds"] > 0
    assert "identification" not in record  # this method does not judge samples
    assert not names & {"suspects.csv", "suspects.png", "scores.png", "rounds.png"}
    assert str(victim) not in (victim / "result.json").read_text()


@pytest.mark.parametrize(("instructions", "told"), [(True, False), (False, True)])
def test_slow_bfloat16_is_told(tmp_path, monkeypatch, caplog, instructions, told):
    monkeypatch.setattr("bdclean.commands.trainer_settings.cpu_has_bfloat16", lambda: instructions)
    quick = ["--model.width", "4", "--trainer.fast_dev_run", "true", "--test_after_fit", "false"]
    with caplog.at_level("INFO"):
        main(["fit", *BASE, *stack("train/supervised/fast"), "--run", str(tmp_path), *quick])
    assert ("--trainer.precision 32-true is faster" in caplog.text) == told


@pytest.mark.parametrize("method", [name for name in QUICK if name != "train/supervised/fast"])
def test_every_method_fits_tests_reloads_and_predicts(tmp_path, victim, method):
    run = tmp_path / "run"
    weights = ["--model.weights", str(victim / "model.safetensors")]
    record = fit(run, method, *([] if method in FROM_DATA else weights))
    assert set(record["metrics"]) == {"acc", "asr", "asr_floor", "pa", "n_clean", "n_triggered"}
    # a fit that begins in somebody's folder refuses what it would write over
    assert {path.name for path in run.iterdir()} <= {*OF_FIT, "config.yaml", "checkpoints"}
    # our own file describes itself
    model = load_model(run / "model.safetensors")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    # the checkpoint is readable without unpickling, and gives the same metrics
    checkpoint = run / "checkpoints" / "last.ckpt"
    torch.load(checkpoint, weights_only=True)
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    config = str(moved / "config.yaml")
    checkpoint = str(moved / "checkpoints" / "last.ckpt")
    main(["test", "-c", config, "--ckpt_path", checkpoint])
    assert json.loads((moved / "test.json").read_text())["metrics"] == record["metrics"]
    main(["predict", "-c", config, "--ckpt_path", checkpoint])
    clean = load_file(moved / "predictions-clean.safetensors")
    triggered = load_file(moved / "predictions-triggered.safetensors")
    assert len(clean["index"]) == 397
    assert clean["index"].tolist() == list(range(397))
    asr = (triggered["logits"].argmax(1) == 6).float().mean().item() * 100
    assert asr == pytest.approx(record["metrics"]["asr"], abs=1e-3)


def test_validate_reads_held_out_training_images(tmp_path, victim):
    weights = ["--model.weights", str(victim / "model.safetensors")]
    words = [*BASE, *stack("purify/bcu"), *weights, "--data.splits.val", "200"]
    main(["validate", *words, "--run", str(tmp_path / "run")])


def test_the_links_reach_the_model(victim):
    """A misspelt link would be ignored in silence; these facts have no default."""
    config = yaml.safe_load((victim / "config.yaml").read_text())
    assert "facts" not in config["model"]["init_args"]
    model = load_model(victim / "model.safetensors")
    assert (model.info.num_classes, model.info.input_size) == (10, 32)
    assert model.info.mean == pytest.approx((0.305, 0.305, 0.305))


def test_a_run_needs_its_folder_alone(victim, capsys):
    main(["test", "--run", str(victim)])
    assert capsys.readouterr().out.splitlines()[0] == f"Written to {victim}: test.json"
    record, test = (json.loads((victim / n).read_text()) for n in ("result.json", "test.json"))
    assert test["metrics"] == record["metrics"]
    main(["predict", "--run", str(victim)])
    assert capsys.readouterr().out.splitlines() == [
        f"Written to {victim}: predictions-clean.safetensors (397 images), "
        "predictions-triggered.safetensors (361 images)"
    ]
    assert load_file(victim / "predictions-clean.safetensors")["logits"].shape == (397, 10)


def test_the_checkpoint_does_not_override_the_command_line(tmp_path, victim):
    """Lightning would let hyper-parameters of the checkpoint win over the words given here."""
    checkpoint = str(victim / "checkpoints" / "last.ckpt")
    config = str(victim / "config.yaml")
    words = ["-c", config, "--ckpt_path", checkpoint, "--model.batch_size", "7"]
    assert lightning.run("test", words).model.hparams["batch_size"] == 7


def test_another_config_does_not_overwrite_a_run(victim, capsys):
    before = {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        fit(victim, "train/supervised/fast", "--model.schedule", "cosine")
    assert stop.value.code == 2
    assert "belongs to a run with another config" in capsys.readouterr().err
    # not even metrics.csv was moved aside
    assert {path: path.read_bytes() for path in victim.rglob("*") if path.is_file()} == before


def test_a_limit_of_the_trainer_leaves_no_result_of_an_untrained_probe(tmp_path, victim, capsys):
    run, weights = tmp_path / "run", ["--model.weights", str(victim / "model.safetensors")]
    record = fit(run, "purify/cbd", *weights, "--trainer.max_steps", "1")
    assert "There is no test." in capsys.readouterr().out
    assert record["metrics"] == {}
    assert (record["protocol"]["head"], record["protocol"]["finished"]) == ("untrained", False)
    assert (run / "model.safetensors").is_file()
    words = ["-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    with pytest.raises(SystemExit) as stop:
        main(["test", *words])
    assert stop.value.code == 2
    assert "before its linear probe was trained" in capsys.readouterr().err
    main(["fit", *words, "--trainer.max_steps", "-1"])
    record = json.loads((run / "result.json").read_text())
    assert (record["protocol"]["head"], record["protocol"]["finished"]) == ("probe", True)
    assert record["metrics"]["n_clean"] == 397


class Remote(Logger):
    """Keeps no files on this machine, as a tracking server does not."""

    name, version = "remote", "0"

    def log_metrics(self, metrics, step=None):
        """Nothing."""

    def log_hyperparams(self, params, *args, **kwargs):
        """Nothing."""


class Absent(Remote):
    """Needs what is not installed."""

    def __init__(self):
        import no_such_tracker  # noqa: F401


def test_a_progress_bar_of_the_users_own(tmp_path):
    bar = ["--trainer.callbacks+", "TQDMProgressBar"]
    assert fit(tmp_path / "run", "train/supervised/fast", *bar)["metrics"]["n_clean"] == 397


@pytest.mark.parametrize(
    "logger", [[f"{__name__}.Remote"], ["CSVLogger", "--trainer.logger.save_dir", "{elsewhere}"]]
)
def test_the_run_folder_is_that_of_the_command_under_any_logger(tmp_path, capsys, logger):
    run = tmp_path / "run"
    words = [word.format(elsewhere=tmp_path / "elsewhere") for word in logger]
    method = "train/supervised/fast"
    record = fit(run, method, "--trainer.logger", *words)
    assert record["metrics"]["n_clean"] == 397
    files = ("config.yaml", "model.safetensors", "plan.safetensors", "trigger.safetensors")
    assert all((run / file).is_file() for file in files)
    assert record["hashes"]["config"] is not None
    assert not list(tmp_path.glob("elsewhere/**/model.safetensors"))
    ended = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        fit(run, method, "--trainer.logger", *words, "--model.schedule", "cosine")
    assert "belongs to a run with another config" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == ended


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_development_run_leaves_no_trace(tmp_path, victim, command):
    words = [*stack("train/supervised/fast"), "--model.weights", str(victim / "model.safetensors")]
    run = ["--trainer.fast_dev_run", "true", "--run", str(tmp_path / "run")]
    main([command, *BASE, *words, *run])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


WRONG = {
    "a missing weights file": (
        ["fit", *BASE, *stack("purify/bcu"), "--model.weights", "no.safetensors"],
        "no.safetensors",
    ),
    "a config that is not there": (["fit", "-c", "purify/cdb"], "Did you mean purify/cbd"),
    "no weights at all": (["fit", *BASE, *stack("purify/bcu")], "weights"),
    "a rate above one": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--data.attack.rate", "1.5"],
        "rate",
    ),
    "a target that is no class": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--data.attack.target", "10"],
        "target",
    ),
    "lambdas that do not add up": (
        ["fit", *BASE, *stack("purify/cbd"), "--model.lambda_pull", "0.9"],
        "lambda",
    ),
    "too few images": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--data.splits.defense", "1400"],
        "leaves none to train on",
    ),
    "a misspelt key": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--model.widht", "4"],
        "widht",
    ),
    "a data set that is not there": (
        [
            "fit",
            *stack("trainer/cpu", "data/cifar10", "train/supervised/fast"),
            "--data.root",
            "nowhere",
        ],
        "cifar-10-batches-py",
    ),
    "a data set defence that isolates nothing": (
        ["fit", *BASE, *stack("sift/abl/fast"), "--model.isolated", "0"],
        "isolated",
    ),
    "a device that is not there": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--trainer.devices", "0"],
        "--trainer.devices=0: it must be auto, or the number of processes on the CPU, 1 or above.",
    ),
    "a strategy that is not there": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--trainer.strategy", "dpp"],
        "--trainer.strategy=dpp: it must be auto, ddp, ddp_find_unused_parameters_false, ",
    ),
    "a package that is not there": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--trainer.logger", f"{__name__}.Absent"],
        "A package is missing. No module named 'no_such_tracker'",
    ),
    "a search that trains before the method begins": (
        [
            *("fit", *BASE, *stack("train/supervised/fast"), "--trainer.callbacks+"),
            *("LearningRateFinder", "--model.width", "4"),
        ],
        "LearningRateFinder does not fit Supervised",
    ),
    "a mean over networks of several stages": (
        [
            *("fit", *BASE, *stack("sift/abl/fast"), "--trainer.callbacks+"),
            *("StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"),
        ],
        "StochasticWeightAveraging does not fit ABL",
    ),
    "an unknown architecture": (
        ["fit", *BASE, *stack("train/supervised/fast"), "--model.arch", "resnet1"],
        "resnet1",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_wrong_use_is_one_message_and_status_two(tmp_path, capsys, case):
    words, text = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--run", str(tmp_path / "run")])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run" / "model.safetensors").exists()
    if "--data.attack" in " ".join(words):  # the folder stays free for the corrected command
        assert not (tmp_path / "run" / "config.yaml").exists()
