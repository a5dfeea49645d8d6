"""Users' own classes and arguments that cannot be made are told in one sentence."""

import pytest
import yaml

from bdclean.attacks import Attack, BadNets
from bdclean.cli import main
from bdclean.data import Digits
from bdclean.training import Supervised
from bdclean.types import ImageFacts

pytestmark = pytest.mark.filterwarnings("ignore")
BEGIN = "its __init__ must begin with super().__init__(...)."


class BareAttack(Attack):
    """Forgets the class above."""

    def __init__(self) -> None:
        pass

    def make_trigger(self, size):
        return BadNets().make_trigger(size)


class HalfAttack(BadNets):
    """Keeps its own arguments alone."""

    def __init__(self, patch_size: int = 3) -> None:
        self.patch_size = patch_size


class BareData(Digits):
    """Forgets it as well."""

    def __init__(self) -> None:
        pass


class BareModel(Supervised):
    """And so does this one."""

    def __init__(self, facts: ImageFacts) -> None:
        self.x = 1


class NoAnnotation(Supervised):
    """Does not say what its facts are."""

    def __init__(self, facts) -> None:
        super().__init__(facts, width=4)


def named(kind):
    return f"{__name__}.{kind.__name__}"


OWN = {
    BareAttack: (["--data.attack", named(BareAttack)], f"BareAttack: {BEGIN}"),
    HalfAttack: (["--data.attack", named(HalfAttack)], f"HalfAttack: {BEGIN}"),
    BareData: (["--data", named(BareData)], f"BareData: {BEGIN}"),
    BareModel: (["--model", named(BareModel)], f"BareModel: {BEGIN}"),
    NoAnnotation: (
        ["--model", named(NoAnnotation)],
        "NoAnnotation: annotate its argument facts with bdclean.types.ImageFacts, as in "
        "`def __init__(self, facts: ImageFacts)`.",
    ),
}
UNKNOWN = {
    "--model.foo: Supervised takes no such argument.": {"model": {"dict_kwargs": {"foo": 1}}},
    "--data.foo: Digits takes no such argument.": {"data": {"dict_kwargs": {"foo": 1}}},
    "--data.attack.foo: BadNets takes no such argument.": {
        "data": {"init_args": {"attack": {"class_path": "BadNets", "dict_kwargs": {"foo": 1}}}}
    },
    "--trainer.logger.foo: CSVLogger takes no such argument.": {
        "trainer": {
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "x"},
                "dict_kwargs": {"foo": 1},
            }
        }
    },
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys, *words):
    with pytest.raises(SystemExit, match="2"):
        main([*words])
    return capsys.readouterr().err.splitlines()[-1]


def fit(*more):
    own = [] if "--model" in more else ["-c", "train/supervised/fast"]
    return ["fit", "-c", "trainer/cpu", "-c", "data/digits", *own, *more]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_a_class_that_is_not_finished(kind, capsys, place):
    words, sentence = OWN[kind]
    assert told(capsys, *fit(*words)) == f"bdclean: {sentence}"
    assert not list(place.iterdir())


def test_an_attack_that_is_not_finished_is_not_drawn(capsys, place):
    words = ["attack", "preview", "-c", "data/digits", "--data.attack", named(BareAttack)]
    assert told(capsys, *words) == f"bdclean: BareAttack: {BEGIN}"
    assert not list(place.iterdir())


@pytest.mark.parametrize("sentence", UNKNOWN)
def test_arguments_at_which_the_parser_does_not_look(sentence, capsys, place):
    (place / "odd.yaml").write_text(yaml.safe_dump(UNKNOWN[sentence]))
    assert told(capsys, *fit("-c", "odd.yaml")) == f"bdclean: {sentence}"
