"""Constructors that forward `**kwargs`: the command line knows, documents and checks them all."""

import inspect

import pytest
import yaml
from jsonargparse import ArgumentParser

import bdclean.data
from bdclean.cli import main
from bdclean.data import GTSRB, Digits, ImageDataModule, ImageFolder, ImageNet100, Imagenette

MODULES = sorted(
    (
        found
        for found in vars(bdclean.data).values()
        if inspect.isclass(found) and issubclass(found, ImageDataModule)
        if found is not ImageDataModule
    ),
    key=lambda found: found.__name__,
)
INHERITED = set(inspect.signature(ImageDataModule.__init__).parameters) - {"self"}


class Own(Digits):
    """A data module of a user, two classes away from the base.

    Args:
        level: Something of its own.
        **kwargs: Those of `ImageDataModule`.
    """

    def __init__(self, level: float = 0.5, eval_batch_size: int = 9, **kwargs):
        super().__init__(eval_batch_size=eval_batch_size, **kwargs)
        self.level = level


def parser():
    made = ArgumentParser(exit_on_error=False)
    made.add_subclass_arguments(ImageDataModule, "data")
    return made


def parse(module, *words):
    return parser().parse_args(["--data", f"{module.__module__}.{module.__name__}", *words])


@pytest.mark.parametrize("module", [*MODULES, Own])
def test_every_argument_of_the_base_is_known_and_kept(module):
    arguments = vars(parse(module, "--data.eval_batch_size", "77").data.init_args)
    assert arguments.keys() >= INHERITED
    assert arguments["eval_batch_size"] == 77
    assert vars(arguments["splits"]) == {
        "defense": 0,
        "probe": 0,
        "val": 0,
        "defense_source": "holdout",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("module", "key", "default"),
    [
        (GTSRB, "view.augmentation", "crop"),
        (ImageNet100, "view.augmentation", "imagenet"),
        (Imagenette, "view.augmentation", "weak"),
        (ImageNet100, "eval_batch_size", 100),
        (Imagenette, "eval_batch_size", 100),
        (GTSRB, "eval_batch_size", 500),
        (Own, "eval_batch_size", 9),
        (ImageNet100, "root", "data/imagenet"),
        (ImageFolder, "input_size", 32),
        (ImageFolder, "mean", (0.485, 0.456, 0.406)),
    ],
)
def test_defaults_of_a_data_set_win_over_those_of_the_base(module, key, default):
    config = parse(module)
    assert config[f"data.init_args.{key}"] == default
    if module is not ImageFolder:
        made = parser().instantiate(config).data
        for name in key.split("."):
            made = getattr(made, name)
        assert made == default


def test_the_forwarded_values_arrive():
    words = ["--data.splits.val", "5", "--data.shuffle_seed", "4", "--data.level", "2"]
    words += ["--data.defense_labels", "visible", "--data.validate_in_fit", "true"]
    made = parser().instantiate(parse(Own, *words)).data
    assert (made.level, made.splits.val, made.shuffle_seed) == (2.0, 5, 4)
    assert (made.defense_labels, made.validate_in_fit, made.eval_batch_size) == ("visible", True, 9)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--data.eval_batch_siez", "3"], "eval_batch_siez"),
        (
            ["--data.eval_batch_size", "many"],
            "eval_batch_size=many: it must be a whole number.",
        ),
        (["--data.splits.prob", "3"], "prob"),
        (["--data.defense_labels", "shown"], "shown"),
    ],
)
@pytest.mark.parametrize("module", [GTSRB, ImageFolder, Own])
def test_misspelt_keys_and_wrong_types_are_refused_by_name(module, words, text, capsys):
    place = f"{module.__module__}.{module.__name__}"
    model = ["--model", "bdclean.training.Supervised"]
    with pytest.raises(SystemExit) as caught:
        main(["fit", *model, "--data", place, *words])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_misspelt_keys_are_refused_in_python_too():
    with pytest.raises(TypeError, match="eval_batch_siez"):
        GTSRB(eval_batch_siez=3)


def test_the_help_documents_the_arguments_of_the_base(capsys):
    main(["fit", "--data.help", "GTSRB"])
    shown = " ".join(capsys.readouterr().out.split())
    for key, text in (
        ("root X", "Folder that holds, or will hold, `gtsrb`."),
        ("eval_batch_size X", "Images per step and device in evaluation."),
        ("defense_root X", "A folder of images, at any depth"),
        ("shuffle_seed X", "Seed of order and augmentation; null takes"),
        ("splits.probe X", "Clean labelled images of the linear probe"),
    ):
        assert f"--data.{key} {text}" in shown


@pytest.mark.filterwarnings("ignore")
def test_a_saved_config_keeps_all_values_and_can_be_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--data", f"{__name__}.Own", "--data.splits.val", "20", "--data.level", "3"]
    words += ["--model", "bdclean.training.Supervised", "--model.width", "4", "--run", "run"]
    words += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    main([*words, "--trainer.accelerator", "cpu", "--test_after_fit", "false"])
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["init_args"]
    assert saved.keys() == INHERITED | {"level"}
    assert (saved["level"], saved["eval_batch_size"], saved["splits"]["val"]) == (3.0, 9, 20)
    assert saved["view"]["augmentation"] == "weak"
    main(["fit", "-c", "run/config.yaml", "--run", "again"])
    again = yaml.safe_load((tmp_path / "again/config.yaml").read_text())["data"]["init_args"]
    assert again == saved
