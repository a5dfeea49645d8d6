from pathlib import Path

import pytest
import torch
from grouping import make_of
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.backbones.head import ProbeHead
from bdclean.callbacks.resume import ExactResume
from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.splits import Splits
from bdclean.errors import ConfigError
from bdclean.training import KNN, LinearProbe
from bdclean.types import ImageFacts, View

FACTS = ImageFacts(4, 8, (0.5,) * 3, (0.2,) * 3)
pytestmark = [
    # Sixty images in memory need no worker processes.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 flattens containers with a class that newer torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    # Runs are resumed without the callback that wrote their checkpoint.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]


def test_the_augmentation_is_that_of_sgd():
    def augmentation(**probe):
        module = make_of(LinearProbe, {"facts": FACTS, "probe": probe})
        recipe = module.plan()[0].recipe
        return module.plan()[0].reads().augmentation, recipe.lr > 0

    assert augmentation() == ("weak", True)
    assert augmentation(recipe={"augmentation": "imagenet"}) == ("imagenet", True)
    # one epoch at a rate of 0, for form's sake
    assert augmentation(recipe={"augmentation": "imagenet"}, solver="lbfgs") == ("none", False)


class TinyData(ImageDataModule):
    name, num_classes, input_size, mean, std = "tiny", 4, 8, (0.1,) * 3, (0.3,) * 3

    def __init__(self):
        super().__init__(splits=Splits(probe=24), shuffle_seed=3)

    def _read(self, rows):
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(rows) % 4
        images = torch.randint(0, 60, (rows, 3, 8, 8), generator=generator)
        images += 45 * labels[:, None, None, None]
        return ImageSet(images.to(torch.uint8), labels)

    def read_train(self):
        return self._read(60)

    def read_test(self):
        return self._read(20)


@pytest.fixture(params=[4, None], ids=["with head", "without head"])
def weights(request, tmp_path):
    torch.manual_seed(5)
    model = build(ModelInfo("resnet18", request.param, 8, FACTS.mean, FACTS.std, width=4))
    for _ in range(3):
        model.features(torch.rand(16, 3, 8, 8))
    path = str(tmp_path / "backbone.safetensors")
    save_model(model, path)
    return path


@pytest.fixture
def make(weights):
    return lambda **probe: make_of(
        LinearProbe, {"facts": FACTS, "weights": weights, "probe": probe}
    )


@pytest.fixture
def fit(tmp_path):
    def run(module, *callbacks, ckpt_path=None):
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            limit_val_batches=0,
            default_root_dir=tmp_path,
            callbacks=[ExactResume(), *callbacks],
        )
        data = TinyData()
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return data, trainer

    return run


def state(model, head):
    return {k: v for k, v in model.state_dict().items() if k.startswith("head.") == head}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_backbone_stays_bit_identical(make, fit, weights, probe):
    module = make(solver=probe, recipe={"epochs": 2})
    data, _ = fit(module)
    assert equal(state(load_model(weights), head=False), state(module.model, head=False))
    assert not any(layer.training for layer in module.model.modules())
    assert data.view.role == "probe"
    assert data.view.labels
    assert isinstance(module.model.head, ProbeHead)


def test_lbfgs_is_logistic_regression_on_standardised_features(make, fit):
    module = make(solver="lbfgs", c=0.5)
    data, trainer = fit(module)
    assert trainer.current_epoch == 1
    # The module's own batches: float32 features depend on the batch in their last digits, and
    # standardising nearly constant ones amplifies that.
    rows = data.reading_dataloader(
        View("probe", labels=True, batch_size=module.probe.view.batch_size)
    )
    batches = [data.device_batch(batch, torch.device("cpu")) for batch in rows]
    labels = torch.cat([batch["label"] for batch in batches])
    with torch.no_grad():
        unit = torch.cat([F.normalize(module.model.features(b["image"]), dim=1) for b in batches])
    inputs = (unit - unit.mean(0)) / (unit.var(0) + 1e-5).sqrt()
    oracle = LogisticRegression(C=0.5, max_iter=5000, tol=1e-10).fit(
        inputs.double().numpy(), labels.numpy()
    )
    wanted = torch.tensor(oracle.predict_log_proba(inputs.double().numpy())).float()
    with torch.no_grad():
        got = torch.cat([F.log_softmax(module.model(b["image"]), dim=1) for b in batches])
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_lbfgs_needs_no_luck(make, fit):
    first, second = (
        make(solver="lbfgs"),
        make(solver="lbfgs", recipe={"batch_size": 5}),
    )
    torch.manual_seed(1)
    fit(first)
    torch.manual_seed(2)
    fit(second)
    torch.testing.assert_close(
        state(first.model, head=True), state(second.model, head=True), rtol=1e-4, atol=1e-5
    )


def test_sgd_follows_the_protocol(make, fit):
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, batch, *_):
            group = trainer.optimizers[0].param_groups[0]
            seen.append((trainer.current_epoch, group["lr"]))
            assert group["momentum"] == 0.9
            assert group["weight_decay"] == 1e-4
            assert len(batch["image"]) == 12

    module = make(recipe={"batch_size": 12})
    fit(module, Rates())
    rate = {**dict.fromkeys(range(15), 1e-2), **dict.fromkeys(range(15, 30), 1e-3)}
    rate |= dict.fromkeys(range(30, 40), 1e-4)
    assert [epoch for epoch, _ in seen] == [epoch for epoch in range(40) for _ in range(2)]
    assert [lr for _, lr in seen] == pytest.approx([rate[epoch] for epoch, _ in seen])


def test_resume_ends_with_the_same_weights(make, fit, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    whole, resumed = make(recipe={"epochs": 3}), make(recipe={"epochs": 3})
    fit(whole, keep)
    torch.load(tmp_path / "ckpt/epoch=1.ckpt", weights_only=True)
    fit(resumed, ckpt_path=tmp_path / "ckpt/epoch=1.ckpt")
    assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("probe", ["sgd", "lbfgs"])
def test_checkpoint_and_export_need_no_backbone_file(make, fit, weights, tmp_path, probe):
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    module = make(solver=probe, recipe={"epochs": 1})
    fit(module, keep)
    Path(weights).unlink()
    restored = LinearProbe.load_from_checkpoint(tmp_path / "ckpt/epoch=0.ckpt", weights_only=True)
    assert equal(module.state_dict(), restored.state_dict())
    path = tmp_path / "probed.safetensors"
    save_model(restored.product(), path)
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(load_model(path).eval()(images), module.model(images))
    assert restored.protocol() == {
        "head": "probe",
        "labels": "clean",
        "method": "linear_probe",
        "probe": probe,
    }


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"recipe": {"batch_size": 0}}, "batch_size=0: it must be at least 1"),
        ({"recipe": {"lr": -0.1}}, "lr=-0.1: it must be at least 0"),
        ({"recipe": {"momentum": -0.1}}, "momentum=-0.1: it must be at least 0"),
        ({"recipe": {"weight_decay": -0.1}}, "weight_decay=-0.1: it must be at least 0"),
        ({"c": 0}, r"probe\.c=0: it must be"),
    ],
)
def test_refuses_numbers_out_of_range(make, probe, message):
    with pytest.raises(ConfigError, match=message):
        make(**probe)


@pytest.mark.parametrize(("key", "value"), [("k", 0), ("batch_size", 0), ("temperature", 0)])
def test_neighbours_refuse_numbers_out_of_range(key, value):
    with pytest.raises(ConfigError, match=f"{key}={value}: it must be"):
        KNN(FACTS, **{key: value})


def test_refuses_wrong_settings(make, fit):
    with pytest.raises(ConfigError, match=r"probe\.solver='knn'.*sgd, lbfgs"):
        make(solver="knn")
    with pytest.raises(ConfigError, match="epochs=0"):
        make(recipe={"epochs": 0})
    with pytest.raises(ConfigError, match=r"model\.weights is not set"):
        fit(LinearProbe(FACTS))
    with pytest.raises(ConfigError, match=r"model\.weights"):
        make().on_load_checkpoint({})
