"""Checkpoints that somebody has made by hand are told in one sentence, which names the part."""

import copy
import shutil

import pytest
import torch

from bdclean.cli import main
from bdclean.errors import ConfigError
from bdclean.modules.checkpoints import check_complete, check_parts

FIT = [
    *("fit", "-c", "trainer/cpu", "-c", "data/digits", "-c", "train/supervised/fast"),
    *("--model.width", "4", "--trainer.max_epochs", "1", "--trainer.max_steps", "2"),
    *("--test_after_fit", "false", "--run", "run"),
]
PARTS = {
    "epoch": 0,
    "global_step": 2,
    "state_dict": {},
    "loops": {"fit_loop": {}},
    "callbacks": {"Some": {}},
    "optimizer_states": [],
    "lr_schedulers": [],
}
WHOLE = {"pytorch-lightning_version": "2.6.0", **PARTS}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("part", WHOLE)
@pytest.mark.parametrize("odd", [3.5, "text", [1], {"a": 1}])
def test_a_part_of_a_wrong_type(part, odd):
    check_parts(WHOLE, "x.ckpt")
    if part == "state_dict" and isinstance(odd, dict):
        return  # whether weights fit is seen when they are loaded
    if isinstance(odd, list) and isinstance(WHOLE[part], list):
        return  # what is in them is seen when they are restored
    with pytest.raises(ConfigError, match=rf"^x\.ckpt: its entry {part} is of a wrong type, so"):
        check_parts(WHOLE | {part: odd}, "x.ckpt")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing(part):
    rest = {name: value for name, value in WHOLE.items() if name != part}
    for checkpoint in rest, rest | {part: None}:
        check_parts(checkpoint, "x.ckpt")
        with pytest.raises(ConfigError, match=rf"^x\.ckpt: its entry {part} is missing, so"):
            check_complete(checkpoint, "x.ckpt", goes_on=True)
        if part != "state_dict":  # weights are enough to measure
            check_complete(checkpoint, "x.ckpt", goes_on=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has a checkpoint and has not ended."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(FIT)
    (place / "run" / "result.json").unlink()
    return place / "run"


def without(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return change


HAND_MADE = {
    "no weights": (without("state_dict"), "its entry state_dict is missing, so"),
    "no loops": (without("loops"), "its entry loops is missing, so"),
    "no epoch": (without("epoch"), "its entry epoch is missing, so"),
    "callbacks of an odd type": (
        lambda c: c.update(callbacks=3),
        "its entry callbacks is of a wrong type, so",
    ),
    "a callback of an odd type": (
        lambda c: c["callbacks"].update(ExactResume=3),
        "its entry callbacks is of a wrong type, so",
    ),
    "no loop of a fit": (
        without("loops", "fit_loop"),
        "its entry loops.fit_loop is odd or missing, so",
    ),
    "no state of the optimizer": (
        lambda c: c.update(optimizer_states=[1]),
        "its entry optimizer_states.0 is odd or missing, so",
    ),
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_a_fit_does_not_go_on_from_it(case, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    change, sentence = HAND_MADE[case]
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    changed = copy.deepcopy(checkpoint)
    change(changed)
    torch.save(changed, "run/checkpoints/last.ckpt")
    with pytest.raises(SystemExit, match="2"):
        main([*FIT, "--ckpt_path", "run/checkpoints/last.ckpt"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        f"bdclean: --ckpt_path run/checkpoints/last.ckpt: {sentence} it is no whole checkpoint of "
        "a run of bdclean; take another one, or start a new run."
    )
