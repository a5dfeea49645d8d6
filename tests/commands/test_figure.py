"""Features in the plane, of a run of the command line."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from PIL import Image

from bdclean.attacks import BadNets
from bdclean.backbones import ModelInfo, build, save_model
from bdclean.cli import main
from bdclean.commands import figure
from bdclean.runs import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.filterwarnings("ignore")
FEW = ["--clean", "40", "--triggered", "20", "--adversarial", "10", "--pgd_steps", "2"]


def stack(*names):
    return [w for name in names for w in ("-c", str(CONFIGS / f"{name}.yaml"))]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "suspect.safetensors"
    save_model(build(ModelInfo("resnet18", None, 32, (0.5,) * 3, (0.2,) * 3, width=4)), path)
    return str(path)


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    """CBD of a backbone without a head, on 100 digits."""
    folder = tmp_path_factory.mktemp("runs") / "cbd"
    words = [
        "fit",
        *stack("trainer/cpu", "data/digits", "attack/badnets/cbd", "purify/cbd/ablation/sft"),
    ]
    words += ["--data.splits.defense", "100", "--model.recipe.batch_size", "50"]
    words += ["--model.recipe.epochs", "1"]
    main([*words, "--model.weights", backbone, "--model.probe", "null", "--run", str(folder)])
    return folder


def test_a_panel_before_and_a_panel_after(run, tmp_path, capsys):
    out = tmp_path / "new" / "tsne.png"
    main(["figure", "tsne", str(run), "--out", str(out), *FEW])
    assert capsys.readouterr().out.splitlines() == [
        "cbd: before: 40 clean images",
        "cbd: after: 40 clean images",
        f"Written to {out}",
    ]
    with Image.open(out) as picture:
        assert picture.width > 1.5 * picture.height  # two panels


def settings(**changes):
    usual = {"clean": 40, "triggered": 20, "adversarial": 10, "epsilon": 8.0, "pgd_steps": 5}
    usual |= {"temperature": 0.5, "perplexity": 10.0, "seed": 0}
    return Namespace(**(usual | changes))


def test_the_images_are_those_of_the_test_set(run):
    data = figure.make_data(RunFolder(run))
    groups = figure.choose(data, settings())
    known = {image.numpy().tobytes() for image in data.test_set.images}
    stamped = {i.numpy().tobytes() for i in data.trigger.poison(data.test_set.images)}
    assert [len(groups[k]) for k in ("clean", "triggered", "adversarial")] == [40, 20, 10]
    assert all(i.numpy().tobytes() in known for k in ("clean", "adversarial") for i in groups[k])
    assert all(i.numpy().tobytes() in stamped - known for i in groups["triggered"])
    again = figure.choose(data, settings())
    other = figure.choose(data, settings(seed=1))
    assert all(torch.equal(groups[k], again[k]) for k in groups)
    assert not torch.equal(groups["clean"], other["clean"])


def test_adversarial_images_leave_their_features_within_the_ball(run):
    (_, before), (_, after) = figure.models(RunFolder(run), RunFolder(run).read_config())
    assert not torch.equal(before.backbone.conv1.weight, after.backbone.conv1.weight)
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = figure.perturb(after.eval(), images, settings())
    assert (moved - images).abs().max() <= 8 / 255 + 1e-6
    step = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 16 / 255
    aimless = (images + step - 8 / 255).clamp(0, 1)
    with torch.no_grad():
        clean, far, near = (after.features(x) for x in (images, moved, aimless))
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(clean, far) < cosine(clean, near)).float().mean() > 0.8


def test_a_run_from_data_alone_has_no_panel_before(run, tmp_path, capsys):
    config = RunFolder(run).read_config()
    config["model"]["init_args"]["weights"] = None
    assert [title for title, _ in figure.models(RunFolder(run), config)] == ["cbd: after"]
    assert capsys.readouterr().err == ""
    config["model"]["init_args"]["weights"] = str(tmp_path / "gone.safetensors")
    assert [title for title, _ in figure.models(RunFolder(run), config)] == ["cbd: after"]
    assert "no panel of the model before" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 100, 101, 250])
def test_no_image_is_attacked_alone(count):
    chunks = figure._chunks(torch.arange(count))
    assert torch.equal(torch.cat(chunks), torch.arange(count))
    assert min(map(len, chunks)) > 1 or count == 1
    assert max(map(len, chunks)) <= figure._CHUNK


def test_attacks_on_every_class_have_no_single_target():
    assert BadNets(target=3).single_target() == 3
    assert BadNets(label_rule="all_to_all").single_target() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "missing: there is no config.yaml"),
        (["RUN", "--out", "x.jpg"], "--out=x.jpg: the picture is a PNG"),
        (["RUN", "--perplexity", "99", *FEW], "--perplexity=99.0: it must be below the 70 points"),
        (["RUN", "--clean", "0"], "clean"),
        ([], "RUN is missing."),
        (["RUN", "--epochs", "3"], "--epochs: there is no such option. The command's --help"),
    ],
)
def test_wrong_use_is_one_message(run, capsys, words, message):
    words = [str(run) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["figure", "tsne", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_that_exists_stays(run, tmp_path, capsys):
    out = tmp_path / "tsne.png"
    out.write_text("mine")
    with pytest.raises(SystemExit):
        main(["figure", "tsne", str(run), "--out", str(out)])
    assert f"--out={out}: the file exists; name a new one, or give --overwrite." in (
        capsys.readouterr().err
    )
    assert out.read_text() == "mine"
    main(["figure", "tsne", str(run), "--out", str(out), "--overwrite", *FEW])
    assert out.read_bytes()[1:4] == b"PNG"
    assert "cbd: after: t-SNE of 70 points" in capsys.readouterr().err


def test_long_work_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("bdclean.progress.FIRST_LINE", 0.0)
    made = figure._in_chunks(lambda chunk: chunk + 1, torch.zeros(250, 1), "cbd: images")
    assert torch.equal(made, torch.ones(250, 1))
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("cbd: images: 84/250 images  ")
    assert told[-1].startswith("cbd: images: 250/250 images  ")


def test_a_run_without_an_attack_or_a_product_is_told(run, tmp_path):
    config = RunFolder(run).read_config()
    config["data"]["init_args"]["attack"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(figure.ConfigError, match="no attack"):
        figure.make_data(RunFolder(tmp_path))
    with pytest.raises(figure.ConfigError, match="let the run end first"):
        figure.models(RunFolder(tmp_path), config)
