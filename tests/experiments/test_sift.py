import csv
import hashlib

import pytest
import torch
import yaml
from PIL import Image

from bdclean.backbones import load_model
from bdclean.cli import main
from bdclean.errors import DataError
from bdclean.experiments import sift

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = [
    *("--size", "16", "--fast", "--model.width", "4", "--model.recipe.epochs", "1"),
    *("--model.recipe.batch_size", "16", "--model.rounds", "1", "--model.pgd_steps", "1"),
    *("--model.finetune_epochs", "1", "--model.partition_rate", "0.3"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
]


@pytest.fixture
def folder(tmp_path):
    """Three classes of thirty images that differ in colour."""
    draw = torch.Generator().manual_seed(0)
    for label, name in enumerate(("apple", "kiwi", "plum")):
        place = tmp_path / "fruit" / name
        place.mkdir(parents=True)
        for number in range(30):
            pixels = torch.randint(0, 90, (20, 20, 3), generator=draw, dtype=torch.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels.numpy()).save(place / f"{number:02}.png")
    return tmp_path / "fruit"


def state(folder):
    return {
        file.relative_to(folder): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime_ns,
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_folder_in_suspects_and_a_model_out(folder, tmp_path, capsys):
    before, out, kept = state(folder), tmp_path / "out", tmp_path / "kept"
    main(["sift", str(folder), "--out", str(out), "--copy-clean", str(kept), *QUICK])
    told = capsys.readouterr().out
    assert state(folder) == before
    rows = list(csv.DictReader((out / "suspects.csv").open()))
    assert len(rows) == 90
    clean = {row["file"] for row in rows if row["flagged"] in ("0", "False", "false")}
    assert {file.as_posix() for file in state(kept)} == clean
    assert f"{90 - len(clean)} of 90 images are flagged" in told
    assert f"{len(clean)} files copied" in told
    assert load_model(out / "model.safetensors")(torch.rand(1, 3, 16, 16)).shape == (1, 3)
    assert (out / "suspects.png").is_file()


def test_a_dry_run_scores_only(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["sift", str(folder), "--out", str(out), "--dry-run", *QUICK])
    assert len(list(csv.DictReader((out / "suspects.csv").open()))) == 90
    assert "Nothing was flagged" in capsys.readouterr().out


def test_the_short_settings_are_those_of_the_file(request):
    path = request.config.rootpath / "configs" / "purify" / "advrbd_fast.yaml"
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]
    full = yaml.safe_load(path.with_name("advrbd.yaml").read_text())["model"]["init_args"]

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    fast, slow = dict(flat(settings)), dict(flat(full))
    assert {k: v for k, v in fast.items() if slow[k] != v} == {
        key: yaml.safe_load(value) for key, value in sift._SHORT.items()
    }


def test_the_size_is_that_of_the_images(folder, tmp_path):
    assert sift.image_size(folder) == 32
    big = tmp_path / "big" / "a"
    big.mkdir(parents=True)
    Image.new("RGB", (300, 240)).save(big / "x.jpg")
    assert sift.image_size(tmp_path / "big") == 224
    (big / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.jpg cannot be read as an image"):
        sift.image_size(tmp_path / "big")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dry-run", "--copy-clean", "kept"], "--dry-run flags nothing"),
        (["--copy-clean", "."], "exists already"),
        (["--copy-clean", "{folder}/kept"], "lies inside"),
    ],
)
def test_wrong_use(folder, extra, message, capsys):
    words = [word.format(folder=folder) for word in extra]
    with pytest.raises(SystemExit) as stop:
        main(["sift", str(folder), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_images(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sift", str(tmp_path)])
    assert stop.value.code == 2
    assert "holds no images" in capsys.readouterr().err
