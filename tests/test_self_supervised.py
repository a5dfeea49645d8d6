"""A poisoned backbone without labels: trained, measured, purified and used elsewhere."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from bdclean.backbones import load_model
from bdclean.backbones.head import KNNHead
from bdclean.cli import main
from bdclean.data import Digits, Splits

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore")


def stack(*names):
    return [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]


BASE = stack("trainer/cpu", "data/digits", "attack/badnets/cbd_ssl")
LEARN = ["fit", *BASE, *stack("train/simclr/fast"), "--model.width", "4"]
LEARN += ["--trainer.max_epochs", "2", "--model.batch_size", "128"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "simclr"
    main([*LEARN, "--run", str(run)])
    return run


def record(run, name="result"):
    return json.loads((run / f"{name}.json").read_text())


def test_the_product_is_a_backbone_and_its_record_says_so(backbone):
    made = record(backbone)
    assert made["protocol"]["method"] == "simclr"
    assert made["protocol"]["labels"] == "none"
    assert made["protocol"]["head"] == "none"
    assert made["data"]["num_label_changed"] == 0
    assert load_model(backbone / "model.safetensors").head is None
    torch.load(backbone / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_probe_and_nearest_neighbours_measure_it(backbone, tmp_path):
    weights = ["--model.weights", str(backbone / "model.safetensors")]
    main(["fit", *BASE, *stack("measure/linear_probe"), *weights, "--run", str(tmp_path / "probe")])
    main(["test", *BASE, *stack("measure/knn"), *weights, "--run", str(tmp_path / "knn")])
    probe, knn = record(tmp_path / "probe"), record(tmp_path / "knn", "test")
    for made in (probe, knn):
        assert made["metrics"]["n_clean"] == 397
        assert made["metrics"]["n_triggered"] == 361
    data, model = Digits(), load_model(tmp_path / "probe" / "model.safetensors").eval()
    with torch.no_grad():
        named = model(data.test_set.images / 255).argmax(1)
    right = 100 * (named == data.test_set.labels).float().mean().item()
    assert probe["metrics"]["acc"] == pytest.approx(right, abs=0.3)  # 397 images, other batches
    data.splits = Splits(defense=300, probe=100)
    rows = data.rows.probe
    backbone_only = load_model(backbone / "model.safetensors").eval()
    with torch.no_grad():
        known, asked = (
            backbone_only.features(x / 255)
            for x in (data.stored.images[rows], data.test_set.images)
        )
        named = KNNHead(known, data.stored.labels[rows], 10, 200)(asked).argmax(1)
    right = 100 * (named == data.test_set.labels).float().mean().item()
    assert knn["metrics"]["acc"] == pytest.approx(right, abs=2)  # measured in bfloat16
    assert knn["protocol"] == knn["protocol"] | {"head": "knn", "k": 200, "labels": "clean"}


def test_nearest_neighbours_have_nothing_to_fit(backbone, tmp_path, capsys):
    words = ["--model.weights", str(backbone / "model.safetensors"), "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *BASE, *stack("measure/knn"), *words])
    assert stop.value.code == 2
    assert "KNN has nothing to fit: use `bdclean test`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_probe_without_images_is_told_before_the_training(backbone, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.new("RGB", (32, 32), (number,) * 3).save(tmp_path / "photos" / f"{number}.png")
    words = ["fit", *stack("trainer/cpu", "data/photos", "purify/cbd/ssl")]
    words += ["--data.defense_root", str(tmp_path / "photos"), "--data.input_size", "32"]
    words += ["--model.weights", str(backbone / "model.safetensors")]
    words += ["--model.recipe.batch_size", "16"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--run", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "root=null: without it there are no train images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_monitors_are_logged_on_images_set_aside(tmp_path):
    words = ["--data.splits.val", "100", "--data.validate_in_fit", "true"]
    main([*LEARN, *words, "--trainer.max_epochs", "1", "--run", str(tmp_path / "run")])
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/probe_acc", "val/probe_asr", "val/knn_acc", "train/loss"} <= set(header)
    assert not any(name.startswith("test/") for name in header)


def test_cbd_cleans_it_with_a_flat_folder_of_photos(backbone, tmp_path):
    folder = tmp_path / "photos"
    for number in range(40):
        place = folder / f"trip {number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (48, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place)
    words = ["fit", *stack("trainer/cpu", "data/photos", "purify/cbd/ssl")]
    words += ["--data.defense_root", str(folder), "--data.input_size", "32"]
    words += ["--model.weights", str(backbone / "model.safetensors"), "--model.probe", "null"]
    words += ["--model.recipe", "{epochs: 1, batch_size: 16}", "--model.pgd.steps", "2"]
    assert not any("label" in word or "class" in word for word in words)
    main([*words, "--run", str(tmp_path / "run")])
    before, after = (load_file(r / "model.safetensors") for r in (backbone, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    made = record(tmp_path / "run")
    assert made["data"]["sizes"] == {"defense": 40}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["init_args"]["root"] is None
