"""Groups of settings through the real command line: a part of a group keeps the rest."""

import pytest
import torch
import yaml

from bdclean.backbones import ModelInfo, build, save_model
from bdclean.cli import main
from bdclean.data import Digits
from bdclean.modules import Probe
from bdclean.purification import CBD, Projection

pytestmark = pytest.mark.filterwarnings("ignore")

PGD = {"epsilon": 8.0, "steps": 20, "step_size": 0.1, "step_unit": "relative", "norm": "linf"}
PGD |= {"random_start": True}
RECIPE = {"epochs": 15, "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False}
RECIPE |= {"schedule": "constant", "milestones": [0.5, 0.75], "batch_size": 128}
RECIPE |= {"augmentation": "simclr"}
OF_PROBE = {"epochs": 40, "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
OF_PROBE |= {"schedule": "multistep", "milestones": [0.375, 0.75], "batch_size": 256}
OF_PROBE |= {"augmentation": "weak"}
PROBE = {"solver": "sgd", "recipe": OF_PROBE, "c": 0.1}
PROJECTION = {"mode": "pretrain", "dim": 128, "epochs": 10, "lr": 0.05}


@pytest.fixture
def parse(tmp_path, capsys):
    """The arguments of the model as the command line understands files and words."""

    def parse(*words, files=({},), method="bdclean.purification.CBD"):
        stack = []
        for number, settings in enumerate(files):
            path = tmp_path / f"{number}.yaml"
            model = {"init_args": settings} | ({"class_path": method} if number == 0 else {})
            path.write_text(yaml.safe_dump({"model": model}))
            stack += ["-c", str(path)]
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--data", "bdclean.data.Digits", *stack, *words, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]

    return parse


def test_defaults_are_those_of_the_class(parse):
    found = parse()
    assert {name: found[name] for name in ("pgd", "recipe", "probe", "projection")} == {
        "pgd": PGD,
        "recipe": RECIPE,
        "probe": PROBE,
        "projection": None,
    }
    assert "facts" not in found  # the data module knows them


def test_a_part_of_a_group_keeps_the_rest(parse):
    settings = {
        "recipe": {"epochs": 3},
        "pgd": {"steps": 2},
        "probe": {"solver": "lbfgs"},
        "projection": {"dim": 16},
    }
    found = parse(files=[settings])
    assert found["recipe"] == RECIPE | {"epochs": 3}
    assert found["pgd"] == PGD | {"steps": 2}
    assert found["probe"] == PROBE | {"solver": "lbfgs"}
    assert found["projection"] == PROJECTION | {"dim": 16}


def test_a_part_of_a_group_within_a_group_keeps_the_rest(parse):
    found = parse(files=[{"probe": {"recipe": {"epochs": 4}}}])
    assert found["probe"] == PROBE | {"recipe": OF_PROBE | {"epochs": 4}}


def test_words_change_a_part_of_what_a_file_says(parse):
    words = ["--model.probe.c", "2", "--model.probe.recipe.lr", "0.5", "--model.recipe.epochs", "9"]
    settings = {"probe": {"solver": "lbfgs", "recipe": {"epochs": 4}}, "recipe": {"lr": 0.3}}
    found = parse(*words, files=[settings])
    recipe = OF_PROBE | {"epochs": 4, "lr": 0.5}
    assert found["probe"] == {"solver": "lbfgs", "c": 2.0, "recipe": recipe}
    assert found["recipe"] == RECIPE | {"lr": 0.3, "epochs": 9}


def test_a_second_file_changes_a_part_of_what_the_first_one_says(parse):
    first = {"probe": {"solver": "lbfgs", "recipe": {"epochs": 4}}, "recipe": {"lr": 0.3}}
    second = {"probe": {"c": 2.0}, "recipe": {"epochs": 9}, "projection": {"mode": "joint"}}
    found = parse(files=[first, second])
    recipe = OF_PROBE | {"epochs": 4}
    assert found["probe"] == {"solver": "lbfgs", "c": 2.0, "recipe": recipe}
    assert found["recipe"] == RECIPE | {"lr": 0.3, "epochs": 9}
    assert found["projection"] == PROJECTION | {"mode": "joint"}


@pytest.mark.parametrize("files", [[{}], [{"probe": {"solver": "lbfgs"}}]])
def test_null_leaves_the_probe_out(parse, files):
    assert parse("--model.probe", "null", files=files)["probe"] is None
    assert parse(files=[*files, {"probe": None}])["probe"] is None


def test_a_probe_comes_back_after_null(parse):
    words = ["--model.probe.solver", "lbfgs"]
    found = parse(*words, files=[{"probe": None}])
    assert found["probe"] == PROBE | {"solver": "lbfgs"}


def test_other_methods_have_groups_as_well(parse):
    found = parse(
        files=[{"rounds": {"count": 2}, "patch": {"pgd": {"steps": 3}}}],
        method="bdclean.sifting.AdvrBD",
    )
    assert found["rounds"] == {
        "count": 2,
        "of_all": 3,
        "partition_rate": 0.02,
        "max_clean_fraction": 0.9,
        "candidates": 4,
        "ascent_steps": 96,
        "agreement": 0.5,
        "label_share": 0.3,
    }
    assert found["patch"]["pgd"] == PGD | {"steps": 3, "step_size": 0.25}
    found = parse(
        files=[{"mask": {"lr": 0.5}, "recipe": {"epochs": 4}}],
        method="bdclean.training.InputAwareTraining",
    )
    assert found["mask"] == {"lr": 0.5, "betas": [0.5, 0.9], "milestones": [0.4, 0.8]}
    assert found["recipe"]["epochs"] == 4
    assert found["recipe"]["lr"] == 0.01
    found = parse(
        "--model.pgd.steps",
        "3",
        "--model.width",
        "4",
        method="bdclean.training.AdversarialTraining",
    )
    assert found["pgd"] == PGD | {"steps": 3, "step_size": 2.0, "step_unit": "pixel255"}
    assert (found["width"], found["batch_size"]) == (4, 128)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.recipe.rate", "1"], "recipe.rate"),
        (["--model.probe.solver", "knn"], "knn"),
        (["--model.probe", "none"], "probe"),
        (["--model.probe_c", "1"], "probe_c"),
        (["--model.recipe.epochs", "0"], "--model.recipe.epochs=0: it must be at least 1"),
        (["--model.recipe.lr", "-1"], "--model.recipe.lr=-1.0: it must be at least 0"),
        (["--model.pgd.steps", "0"], "--model.pgd.steps=0: it must be at least 1"),
        (["--model.probe.c", "0"], "probe.c=0.0: it must be above 0"),
        (["--model.projection.lr", "-1"], "projection.lr=-1.0: it must be 0 or above"),
    ],
)
def test_a_wrong_setting_of_a_group_is_told(words, message, tmp_path, capsys):
    command = ["fit", "--data", "bdclean.data.Digits", "--model", "bdclean.purification.CBD"]
    with pytest.raises(SystemExit) as stop:
        main([*command, *words, "--run", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_of_the_command_line_has_the_groups_and_its_checkpoint_loads(tmp_path):
    info = ModelInfo("resnet18", 10, 32, Digits.mean, Digits.std, width=4)
    save_model(build(info), tmp_path / "suspect.safetensors")
    run = tmp_path / "run"
    settings = {
        "data": "bdclean.data.Digits",
        "data.splits": "{defense: 32, probe: 20}",
        "model": "bdclean.purification.CBD",
        "model.weights": str(tmp_path / "suspect.safetensors"),
        "model.recipe": "{epochs: 1, batch_size: 16}",
        "model.pgd.steps": "1",
        "model.probe": "{solver: lbfgs}",
        "model.projection.mode": "joint",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": "-1",
        "trainer.reload_dataloaders_every_n_epochs": "1",
        "test_after_fit": "false",
        "run": str(run),
    }
    main(["fit", *(word for key, value in settings.items() for word in (f"--{key}", value))])
    path = run / "checkpoints" / "last.ckpt"
    kept = torch.load(path, weights_only=True)
    module = CBD.load_from_checkpoint(path, weights_only=True)
    assert module.facts.num_classes == 10
    assert module.facts.mean == Digits.mean
    assert (module.recipe.epochs, module.recipe.batch_size, module.recipe.lr) == (1, 16, 0.02)
    assert module.pgd.steps == 1
    assert module.probe == Probe("lbfgs")
    assert module.projection == Projection("joint")
    assert module.finished
    state = module.state_dict()
    assert state.keys() == kept["state_dict"].keys()
    assert all(torch.equal(value, kept["state_dict"][key]) for key, value in state.items())
