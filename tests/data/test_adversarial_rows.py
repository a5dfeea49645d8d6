"""Perturbed training rows: the ascent, 8 bits, the cache, and the surrogates that are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

from bdclean.attacks import Adversarial, BadNets, LabelConsistent
from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.cli import main
from bdclean.data import Digits, ImageSet, Splits
from bdclean.data import adversarial_rows as room
from bdclean.data.adversarial_rows import adversarial_rows, perturb
from bdclean.errors import AttackError, WeightsError
from bdclean.functional.pgd import PGD
from bdclean.types import View

TARGET = 6
CBD = PGD(16, 7, 4, "pixel255", random_start=False)


class SmallDigits(Digits):
    """The digits at their own 8 x 8 pixels."""

    input_size = 8

    def read_train(self):
        return read(slice(400, None))

    def read_test(self):
        return read(slice(0, 400))


def read(part):
    grey, labels = load_digits(return_X_y=True)
    levels = torch.from_numpy(grey[part]).float().mul(255 / 16).round().to(torch.uint8)
    images = levels.view(-1, 1, 8, 8).expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, torch.from_numpy(labels[part]).long())


def fitted(seed=0, num_classes=10, size=8):
    """A random net whose head is solved for: a fair classifier in half a second."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        info = ModelInfo("resnet18", num_classes, size, (0.3,) * 3, (0.3,) * 3, 8, head="probe")
        model = build(info)
        base = read(slice(400, 1200))
        images = base.images.float() / 255
        with torch.no_grad():
            for _ in range(8):
                model.features(images[:200])  # statistics of batch norm
            model.eval()
            if size == 8 and num_classes == 10:
                model.head.solve_(model.features(images), base.labels, 0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return fitted()


@pytest.fixture(scope="module")
def surrogate(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("surrogate") / "model.safetensors"
    save_model(model, path)
    return str(path)


@pytest.fixture
def rows():
    base = SmallDigits().stored
    chosen = (base.labels == TARGET).nonzero().flatten()[:40]
    return base.images[chosen], base.labels[chosen]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bdclean" / "perturbations"


def data(**arguments):
    return SmallDigits(attack=LabelConsistent(target=TARGET, **arguments), splits=Splits(val=20))


def seen(module):
    batches = [dict(b) for b in module.reading_dataloader(View("train", labels=True))]
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def everything(loader):
    return torch.cat([batch["image"] for batch in loader])


# ---------------------------------------------------------------------- the ascent


def literal(model, x, y, eps, a, steps):
    x_i = x
    for _ in range(steps):
        x_i = x_i.detach().requires_grad_()
        F.cross_entropy(model(x_i), y).backward()
        moved = x_i.detach() + a * x_i.grad.sign()
        x_i = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return x_i


@pytest.mark.parametrize(("eps", "a", "steps"), [(16, 4, 7), (8, 1.5, 20)])
def test_against_a_literal_transcription(model, rows, eps, a, steps):
    images, labels = rows
    config = PGD(eps, steps, a, "pixel255", random_start=False)
    ours = perturb(model, images, labels, config)
    exact = literal(model.copy(), images.float() / 255, labels, eps / 255, a / 255, steps)
    wanted = (exact * 255).round()
    # folded batch norms give other last digits, so that the sign of a gradient near 0 may turn,
    # and with it the rest of that image's way
    assert (ours == wanted).float().mean() > 0.9
    assert (ours == wanted).flatten(1).all(1).float().mean() > 0.8
    assert (ours.float() - images).abs().amax() == eps


def test_it_climbs_and_the_surrogate_is_fooled(model, rows):
    images, labels = rows
    changed = perturb(model, images, labels, CBD)
    with torch.no_grad():
        before, after = model(images.float() / 255), model(changed.float() / 255)
    loss = [F.cross_entropy(z, labels, reduction="none") for z in (before, after)]
    assert (loss[1] >= loss[0]).float().mean() >= 0.95
    accuracy = [(z.argmax(1) == labels).float().mean() for z in (before, after)]
    assert accuracy[0] > 0.7
    assert accuracy[1] < accuracy[0] - 0.4


def test_rounded_and_projected_onto_whole_levels(model, rows):
    images, labels = rows
    made = perturb(model, images, labels, PGD(7.5, 3, 5, "pixel255"))
    difference = (made.int() - images.int()).abs()
    assert difference.max() == 7
    config = PGD(16, 1, 1.6, "pixel255", random_start=False)
    one_step = perturb(model, images, labels, config).int() - images.int()
    levels = set(one_step[(images > 2) & (images < 253)].unique().tolist())
    assert {-2, 2} <= levels <= {-2, 0, 2}  # 1.6 is rounded, not cut


def test_batches_change_nothing(model, rows, monkeypatch):
    images, labels = rows
    whole = perturb(model, images, labels, CBD)
    monkeypatch.setattr(room, "BATCH_SIZE", 7)
    parts = perturb(model, images, labels, CBD)
    assert (whole == parts).float().mean() > 0.9  # other last digits, see above


def test_the_mode_of_caller_and_surrogate_do_not_matter(model, rows):
    images, labels = rows
    wanted = perturb(model, images, labels, CBD)
    training = model.copy().train()
    before = training.state_dict()["backbone.bn1.running_mean"].clone()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(perturb(training, images.clone(), labels.clone(), CBD), wanted)
    assert training.training
    assert all(p.grad is None for p in training.parameters())
    assert torch.equal(training.state_dict()["backbone.bn1.running_mean"], before)


# ---------------------------------------------------------------------- through the data module


@pytest.mark.parametrize("patch", ["single", "corners4", "corners4_same"])
def test_training_rows_are_perturbed_and_labels_stay(surrogate, patch):
    module = data(surrogate=surrogate, patch=patch)
    plan, clean = module.plan, module.stored.images[module.rows.train]
    batch = seen(module)
    true = module.stored.labels[module.rows.train]
    assert torch.equal(batch["label"], true)
    assert (true[plan.poison_index] == TARGET).all()
    assert len(plan.poison_index) == round(0.6 * (true == TARGET).sum().item())
    assert torch.equal(batch["image"][plan.clean_index], clean[plan.clean_index])
    poisoned, images = batch["image"][plan.poison_index], clean[plan.poison_index]
    mask = module.trigger.mask.expand_as(images)
    white = (module.trigger.pattern * 255).to(torch.uint8).expand_as(images)
    assert torch.equal(poisoned[mask], white[mask])
    outside = ~mask
    assert (poisoned.int() - images.int()).abs()[outside].max() == 16
    expected = perturb(load_model(surrogate), images, true[plan.poison_index], CBD)
    assert torch.equal(poisoned[outside], expected[outside])


def test_epsilon_zero_is_badnets_on_the_target_class():
    ours = data(epsilon=0)
    badnets = BadNets(
        target=TARGET,
        rate=0.6,
        rate_base="target_class",
        label_rule="clean_label",
        position="top_left",
    )
    other = SmallDigits(attack=badnets, splits=Splits(val=20))
    assert torch.equal(seen(ours)["image"], seen(other)["image"])
    assert "surrogate_hash" not in ours.describe()


def test_test_images_differ_on_the_patch_alone():
    module = data(amplitude=0.1)  # and need no surrogate
    clean, triggered = module.test_dataloader()
    labels = torch.cat([batch["label"] for batch in clean])
    before, after = everything(clean)[labels != TARGET], everything(triggered)
    changed = (before != after).any(0).any(0)
    assert torch.equal(changed & ~module.trigger.mask[0], torch.zeros(8, 8, dtype=torch.bool))
    assert torch.equal(after, module.trigger.poison(before))


def test_the_record_has_the_hash_of_the_surrogate_and_no_path(surrogate, tmp_path):
    facts = data(surrogate=surrogate).describe()
    model = load_model(surrogate)
    assert facts["surrogate_hash"] == save_model(model, tmp_path / "again.safetensors")
    assert str(Path(surrogate).parent) not in json.dumps(facts)
    assert data().describe()["surrogate_hash"] is None
    assert facts["plan_hash"] == data().describe()["plan_hash"]


def test_other_roles_and_evaluation_need_no_surrogate():
    module = data()
    module.setup("fit")
    module.setup("test")
    assert len(module.test_dataloader()) == 2
    with pytest.raises(AttackError, match=r"attack\.surrogate=null: .*surrogate/adversarial"):
        module.role_images("train", labels=True)


# ---------------------------------------------------------------------- the cache


@pytest.fixture
def loads(monkeypatch):
    """Names of the files of surrogates that are loaded."""
    found = []

    def count(file):
        found.append(Path(file).name)
        return load_model(file)

    monkeypatch.setattr(room, "load_model", count)
    return found


def test_a_second_time_comes_from_the_cache(surrogate, rows, cache, loads):
    wanted = Adversarial(surrogate, CBD)
    first = adversarial_rows(wanted, *rows, 10)
    (file,) = cache.iterdir()
    assert torch.equal(adversarial_rows(wanted, *rows, 10), first)
    assert loads == ["model.safetensors"]
    assert torch.equal(load_file(file)["images"], first)


def test_whatever_changes_the_result_changes_the_key(surrogate, rows, cache, loads, tmp_path):
    other = str(tmp_path / "other.safetensors")
    save_model(fitted(seed=1), other)
    images, labels = rows
    brighter = images.clone()
    brighter[0, 0, 0, 0] += 1
    calls = [
        (Adversarial(surrogate, CBD), images, labels),
        (Adversarial(other, CBD), images, labels),
        (Adversarial(surrogate, PGD(16, 7, 3, "pixel255", random_start=False)), images, labels),
        (Adversarial(surrogate, PGD(16, 6, 4, "pixel255", random_start=False)), images, labels),
        (Adversarial(surrogate, PGD(15, 7, 4, "pixel255", random_start=False)), images, labels),
        (Adversarial(surrogate, CBD), brighter, labels),
        (Adversarial(surrogate, CBD), images, labels.roll(1) + 1),
    ]
    for call in calls:
        adversarial_rows(*call, 10)
    assert len(loads) == len(list(cache.iterdir())) == len(calls)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(surrogate).read_bytes())
    adversarial_rows(Adversarial(str(moved), CBD), images, labels, 10)
    assert len(loads) == len(calls)  # the content counts, not the name


def spoil_header(file):
    file.write_bytes(file.read_bytes()[:50])


def spoil_pixel(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def other_content(file):
    save_file({"other": torch.zeros(3)}, file)


@pytest.mark.parametrize("spoil", [spoil_header, spoil_pixel, other_content])
def test_a_damaged_file_is_made_again(surrogate, rows, cache, loads, caplog, spoil):
    wanted = Adversarial(surrogate, CBD)
    first = adversarial_rows(wanted, *rows, 10)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    spoil(file)
    assert torch.equal(adversarial_rows(wanted, *rows, 10), first)
    assert "is damaged" in caplog.text
    assert len(loads) == 2
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(surrogate, rows, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    adversarial_rows(Adversarial(surrogate, CBD), *rows, 10)
    assert "not kept" in caplog.text


# ---------------------------------------------------------------------- surrogates that do not fit


def refuse(file, rows, match, error=AttackError):
    with pytest.raises(error, match=match):
        adversarial_rows(Adversarial(str(file), CBD), *rows, 10)


def test_surrogates_that_are_refused(rows, tmp_path):
    file = tmp_path / "net.safetensors"
    refuse(file, rows, r"attack\.surrogate=.*net\.safetensors: there is no such file; -c train/")
    save_model(fitted(num_classes=4), file)
    refuse(
        file,
        rows,
        r"has 4 classes and takes images of 8 pixels; it must have 10 classes and take 8",
    )
    save_model(fitted(size=16), file)
    refuse(file, rows, r"has 10 classes and takes images of 16 pixels")
    headless = fitted()
    headless.replace_head(None)
    save_model(headless, file)
    refuse(file, rows, r"has no classes")
    save_file({"weight": torch.zeros(3)}, file)
    refuse(file, rows, r"does not describe its network; it must be the model\.safetensors of a run")
    file.write_bytes(b"no weights")
    refuse(file, rows, "is a text that begins with", WeightsError)


# ---------------------------------------------------------------------- the command line


@pytest.mark.filterwarnings("ignore")
def test_a_surrogate_and_a_victim_from_the_command_line(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)

    def fit(run, *names):
        files = ["trainer/cpu", "data/digits", *names]
        words = [word for name in files for word in ("-c", f"{root}/configs/{name}.yaml")]
        quick = ["--model.width", "4", "--trainer.max_epochs", "1", "--run", run]
        return ["fit", *words, *quick, "--trainer.limit_train_batches", "2"]

    quick = ["--model.pgd.steps", "1", "--test_after_fit", "false"]
    main([*fit("surrogate", "train/surrogate/adversarial"), *quick])
    record = json.loads(Path("surrogate/result.json").read_text())
    assert record["protocol"]["method"] == "adversarial_training"
    assert record["seed"] == 1
    victim = fit("victim", "attack/label_consistent/cbd", "train/supervised/noaug")
    with pytest.raises(SystemExit) as stop:
        main(victim)
    assert stop.value.code == 2
    assert "attack.surrogate=null" in capsys.readouterr().err
    file = "surrogate/model.safetensors"
    victim = [*victim, "--data.attack.pgd_steps", "2", "--data.attack.surrogate", file]
    victim[victim.index("victim")] = "second"
    main(victim)
    result = json.loads(Path("second/result.json").read_text())
    facts = result["data"]
    assert set(result["metrics"]) == {"acc", "asr", "asr_floor", "pa", "n_clean", "n_triggered"}
    assert facts["surrogate_hash"] == record["hashes"]["weights"]
    assert facts["num_label_changed"] == 0
    assert facts["num_poisoned"] > 0
    assert "perturbing images on cpu: " in capsys.readouterr().err
