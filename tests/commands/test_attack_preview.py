"""The picture of attacks shows what the test loader shows, and measures it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdclean.attacks import BadNets, Blend, Trigger
from bdclean.cli import main
from bdclean.commands.attack_preview import preview, write_preview
from bdclean.data import Digits, RoleImages, Splits
from bdclean.data.images import Overlay
from bdclean.errors import ConfigError
from bdclean.figures.triggers import draw, psnr

CONFIGS = Path(__file__).parents[2] / "configs"
SPLITS = Splits(defense=300, probe=100)
DIGITS = ["-c", str(CONFIGS / "data/digits.yaml")]


def digits(attack=None):
    return Digits(attack=attack or BadNets(target=6, position="top_left"), splits=SPLITS)


@pytest.fixture(scope="module")
def data():
    return digits()


def test_psnr_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 256, (2, 4, 3, 5, 5), generator=generator, dtype=torch.uint8)
    for value, x, y in zip(psnr(a, b), a.numpy() / 255, b.numpy() / 255, strict=True):
        assert float(value) == pytest.approx(10 * math.log10(1 / np.mean((x - y) ** 2)), abs=1e-9)


def test_psnr_of_one_value_of_twelve_and_of_equal_images():
    black = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    other = black.clone()
    other[0, 1, 1, 0] = 255
    assert psnr(black, other).tolist() == [pytest.approx(10.791812, abs=1e-6), math.inf]
    assert psnr(other, black).tolist() == psnr(black, other).tolist()


def test_images_are_those_of_the_test_loaders(data):
    seen = preview("badnets", data, images=7)
    clean, triggered = (
        {k: torch.cat([batch[k] for batch in loader]) for k in ("image", "label")}
        for loader in data.test_dataloader()
    )
    eligible = (clean["label"] != 6).nonzero().flatten().tolist()
    for k in range(7):
        (row,) = (r for r in range(397) if torch.equal(clean["image"][r], seen.clean[k]))
        assert torch.equal(triggered["image"][eligible.index(row)], seen.triggered[k])
    before = clean["image"][eligible].double() / 255
    after = triggered["image"].double() / 255
    expected = 10 * (1 / (after - before).square().flatten(1).mean(1)).log10()
    assert torch.allclose(seen.psnr_all, expected)
    assert seen.mean_psnr == pytest.approx(float(expected.mean()))
    assert torch.equal(seen.psnr, psnr(seen.clean, seen.triggered))
    assert seen.as_trained is None


def test_the_choice_depends_on_the_seed_alone(data):
    first = preview("a", data, images=3, seed=1).clean
    assert torch.equal(preview("b", digits(Blend(target=6)), images=3, seed=1).clean, first)
    assert not torch.equal(preview("a", data, images=3, seed=2).clean, first)
    assert torch.equal(preview("a", data, images=1, seed=1).clean, first[:1])


class LeavesSome(Trigger):
    """Darkens images whose first column is not all black, and no others."""

    def __init__(self, size, never=False):
        super().__init__(size)
        self.never = never

    def stamp(self, images: Tensor) -> Tensor:
        some = images[..., 0].amax(dim=(-2, -1)) > 0
        return images * (1 - 0.5 * some[:, None, None, None] * (not self.never))


class Leaving(BadNets):
    def make_trigger(self, size):
        return LeavesSome(size, never=self.patch_size == 4)


def test_unchanged_images_are_counted_apart():
    seen = preview("some", digits(Leaving(target=6)))
    unchanged = int(seen.psnr_all.isinf().sum())
    assert 0 < unchanged < len(seen.psnr_all) == 361
    finite = [value for value in seen.psnr_all.tolist() if value != math.inf]
    assert seen.mean_psnr == pytest.approx(sum(finite) / len(finite))
    text = f"over {361 - unchanged} test images; {unchanged} more stay as they are"
    assert seen.summary().endswith(text)


def test_a_trigger_that_changes_nothing_is_infinitely_faithful():
    seen = preview("none", digits(Leaving(target=6, patch_size=4)))
    assert seen.mean_psnr == math.inf
    assert seen.summary().startswith("none: PSNR inf dB, mean inf dB over 0 test images; 361 more")


class TrainedOtherwise(Digits):
    """Its poisoned training images are inverted, the last of them is as in the test."""

    def role_images(self, role, *, labels):
        images = super().role_images(role, labels=labels)
        stored = 255 - images.overlay.images
        stored[-1] = images.overlay.images[-1]
        overlay = Overlay(images.overlay.rows, stored)
        return RoleImages(images.images, images.rows, overlay, images.columns)


def test_another_version_in_training_gets_a_column(data):
    other = TrainedOtherwise(attack=BadNets(target=6, rate=0.004), splits=SPLITS)
    assert len(other.plan.poison_index) == 4
    seen = preview("other", other, images=5)
    stored = other.role_images("train", labels=True).overlay.images
    shown = {image.numpy().tobytes() for image in seen.as_trained}
    assert shown == {image.numpy().tobytes() for image in stored[:3]}
    assert seen.summary().endswith("training uses another version of the trigger")
    panels = draw([seen, preview("plain", data)]).axes
    assert len(panels) == 6 * 4
    columns = [[bool(panel.images) for panel in panels[4 * k : 4 * k + 4]] for k in range(6)]
    assert columns == [[True] * 4] * 3 + [[True, True, True, False]] * 3


def test_the_picture_shows_these_images(data):
    seen = preview("badnets", data, images=2)
    panels = draw([seen], amplify=3).axes
    assert [panel.get_title() for panel in panels[:3]] == ["clean", "triggered", "difference x 3"]
    for k in range(2):
        clean, triggered = (x[k].permute(1, 2, 0).int() for x in (seen.clean, seen.triggered))
        expected = (clean, triggered, (3 * (triggered - clean).abs()).clamp(max=255))
        for panel, image in zip(panels[3 * k : 3 * k + 3], expected, strict=True):
            assert np.array_equal(panel.images[0].get_array(), image.numpy())
    label = panels[0].get_ylabel().split("\n")
    assert label == ["badnets", f"PSNR {seen.psnr[0]:.1f} dB", f"mean {seen.mean_psnr:.1f} dB"]
    assert panels[3].get_ylabel() == f"PSNR {seen.psnr[1]:.1f} dB"


def test_a_patch_changes_its_corner_alone():
    side = 6
    attack = BadNets(target=0, patch_size=side)
    seen = preview("badnets", digits(attack), images=6)
    panels = draw([seen], amplify=1).axes
    images = [torch.as_tensor(np.asarray(panel.images[0].get_array())).int() for panel in panels]
    clean, triggered, difference = images[::3], images[1::3], images[2::3]
    assert len(clean) == 6
    for before, after, gap in zip(clean, triggered, difference, strict=True):
        assert torch.equal((after - before).abs(), gap)
        assert gap.any()
        gap[-side:, -side:] = 0
        assert not gap.any()


def test_the_difference_may_exceed_what_a_pixel_holds(data):
    panel = draw([preview("badnets", data)], amplify=1000.5).axes[2]
    assert np.unique(panel.images[0].get_array()).tolist() == [0, 255]


def test_a_file_that_cannot_be_written(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_preview([("a", data)], tmp_path / "file" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_draws_one_row_per_file(tmp_path, capsys):
    out = tmp_path / "new" / "preview.png"
    files = [str(CONFIGS / f"attack/{name}/cbd.yaml") for name in ("badnets", "sig")]
    main(["attack", "preview", *DIGITS, "--attacks", *files, "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["badnets/cbd", "sig/cbd"]
    assert lines[2] == f"Written to {out}"
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 300
    assert [path.name for path in out.parent.iterdir()] == ["preview.png"]


def test_a_picture_that_exists_stays(tmp_path, capsys):
    out = tmp_path / "preview.png"
    out.write_text("mine")
    words = ["attack", "preview", *DIGITS, "-c", BADNETS, "--out", str(out)]
    with pytest.raises(SystemExit):
        main(words)
    assert f"--out={out}: the file exists; name a new one, or give --overwrite." in (
        capsys.readouterr().err
    )
    assert out.read_text() == "mine"
    main([*words, "--overwrite"])
    assert out.read_bytes()[1:4] == b"PNG"


BADNETS, SIG = (str(CONFIGS / f"attack/{name}/cbd.yaml") for name in ("badnets", "sig"))
WRONG = {
    "no attack": (DIGITS, "attack=null"),
    "a file without attack": (
        [*DIGITS, "--attacks", str(CONFIGS / "attack/none.yaml")],
        "none: --data.attack=null",
    ),
    "two places for attacks": ([*DIGITS, "-c", BADNETS, "--attacks", SIG], "has the attack"),
    "a missing file": ([*DIGITS, "--attacks", BADNETS, "missing.yaml"], "missing.yaml"),
    "no data": (["--attacks", BADNETS], "data"),
    "too many images": ([*DIGITS, "-c", BADNETS, "--images", "362"], "only 361 test images"),
    "no image": ([*DIGITS, "-c", BADNETS, "--images", "0"], "images"),
    "another format": ([*DIGITS, "-c", BADNETS, "--out", "preview.jpg"], ".png"),
    "a misspelt flag": ([*DIGITS, "-c", BADNETS, "--amplfy", "2"], "amplfy"),
    "a misspelt setting": ([*DIGITS, "-c", BADNETS, "--data.attack.rat", "2"], "rat"),
    "a setting out of range": ([*DIGITS, "-c", BADNETS, "--data.attack.rate", "2"], "rate"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_wrong_use_is_one_message_and_status_two(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    words, text = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        main(["attack", "preview", *words])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert text in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["bogus"]])
def test_an_unknown_command_names_the_known_ones(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["attack", *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "preview" in said
    assert "export" in said


@pytest.mark.parametrize("command", ["preview", "export"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["attack", command, "--help"])
    assert not stop.value.code
    assert f"Example: bdclean attack {command} -c" in " ".join(capsys.readouterr().out.split())
