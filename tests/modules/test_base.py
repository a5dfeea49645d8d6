import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from bdclean.backbones import ModelInfo
from bdclean.commands.methods import methods
from bdclean.errors import ConfigError
from bdclean.modules import BackdoorModule, Needs


class LookUp(nn.Module):
    """Stands in for a SplitModel: the pixel value of an image is its predicted class."""

    def __init__(self, with_head=True, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.info = ModelInfo("resnet18", 4 if with_head else None, 2, (0.5,) * 3, (0.2,) * 3)
        self.head = nn.Linear(4, 4, bias=False) if with_head else None
        if with_head:
            self.head.weight.data = torch.eye(4)
            self.head.to(dtype)

    def features(self, x):
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 4).to(self.dtype)

    def forward(self, x):
        return self.head(self.features(x))


def loader(predictions, labels, target=None, batch_size=3):
    rows = []
    for i, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        row = {"image": torch.full((3, 2, 2), float(prediction)), "index": i, "label": label}
        rows.append(row if target is None else row | {"target": target})
    return DataLoader(rows, batch_size=batch_size)


CLEAN = ([0, 1, 2, 3, 0, 0, 1], [0, 1, 2, 3, 0, 1, 2])  # 5 of 7 right
TRIGGERED = ([0, 0, 0, 2, 3], [1, 2, 3, 2, 1])  # 3 of 5 to the target, 1 robust, 1 other


class Bare(BackdoorModule):
    """A module that has a model and does nothing."""

    name = "bare"
    needs = Needs()


def make(model=None):
    module = Bare()
    if model is not None:
        module.model = model
    return module


@pytest.fixture
def trainer(tmp_path):
    with_no_output = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **with_no_output,
    )


pytestmark = [
    # A loader of seven images in memory needs no worker processes.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 flattens containers with a class that newer torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]


def evaluate(trainer, module, loaders, stage="test"):
    run = trainer.test if stage == "test" else trainer.validate
    run(module, loaders, verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("stage", ["test", "val"])
def test_both_loaders_are_scored_under_plain_keys(trainer, stage):
    module = make(LookUp())
    values = evaluate(trainer, module, [loader(*CLEAN), loader(*TRIGGERED, target=0)], stage)
    assert values == {
        f"{stage}/acc": pytest.approx(500 / 7),
        f"{stage}/asr": pytest.approx(60.0),
        f"{stage}/pa": pytest.approx(20.0),
    }
    assert module.evaluation_counts(stage) == {"n_clean": 7, "n_triggered": 5}
    other = "val" if stage == "test" else "test"
    assert module.evaluation_counts(other) == {"n_clean": 0, "n_triggered": 0}


def test_without_a_triggered_loader_only_accuracy_is_logged(trainer):
    module = make(LookUp())
    assert evaluate(trainer, module, loader(*CLEAN)) == {"test/acc": pytest.approx(500 / 7)}
    assert module.evaluation_counts("test") == {"n_clean": 7, "n_triggered": 0}


def test_every_evaluation_starts_from_zero(trainer):
    module = make(LookUp())
    loaders = [loader(*CLEAN), loader(*TRIGGERED, target=0)]
    for _ in range(2):
        dict(module.scores["test"].items())["acc"].update(
            torch.tensor([0]), torch.tensor([1])
        )  # one was broken off
        assert evaluate(trainer, module, loaders)["test/acc"] == pytest.approx(500 / 7)
        assert module.evaluation_counts("test") == {"n_clean": 7, "n_triggered": 5}


def test_batch_size_does_not_change_the_scores(trainer):
    values = [
        evaluate(
            trainer,
            make(LookUp()),
            [loader(*CLEAN, batch_size=b), loader(*TRIGGERED, target=0, batch_size=b)],
        )
        for b in (1, 2, 7)
    ]
    assert values[0] == values[1] == values[2]


def test_a_third_loader_is_refused(trainer):
    with pytest.raises(ConfigError, match="reads at most 2: clean, triggered"):
        evaluate(trainer, make(LookUp()), [loader(*TRIGGERED, target=0)] * 3)


@pytest.mark.parametrize("stage", ["test", "val"])
def test_a_model_without_head_is_refused_with_the_way_out(trainer, stage):
    with pytest.raises(ConfigError, match="-c measure/linear_probe"):
        evaluate(trainer, make(LookUp(with_head=False)), loader(*CLEAN), stage)


def test_evaluation_without_a_model_is_refused(trainer):
    with pytest.raises(ConfigError, match=r"model\.weights"):
        evaluate(trainer, make(), loader(*CLEAN))


def test_prediction_gives_features_and_logits_for_both_loaders(trainer):
    module = make(LookUp(dtype=torch.bfloat16))
    clean, triggered = trainer.predict(
        module, [loader(*CLEAN), loader(*TRIGGERED, target=0)], return_predictions=True
    )
    joined = {key: torch.cat([part[key] for part in clean]) for key in clean[0]}
    assert joined.keys() == {"index", "features", "logits"}
    assert joined["index"].tolist() == list(range(7))
    assert joined["logits"].argmax(1).tolist() == CLEAN[0]
    assert joined["features"].dtype == joined["logits"].dtype == torch.float32
    assert sum(len(part["index"]) for part in triggered) == 5


def test_prediction_without_head_gives_features_alone(trainer):
    first = trainer.predict(make(LookUp(with_head=False)), loader(*CLEAN))[0]
    assert first.keys() == {"index", "features"}
    assert first["features"].shape == (3, 4)


def test_nothing_but_counts_is_kept_and_nothing_is_saved():
    module = make(LookUp())
    assert list(module.state_dict()) == ["model.head.weight"]
    states = [
        getattr(metric, name)
        for scores in module.scores.values()
        for _, metric in scores.items()
        for name in metric._defaults
    ]
    assert len(states) == 16
    assert all(state.shape == () for state in states)


def test_metrics_follow_the_module_to_its_device():
    module = make(LookUp()).to("meta")
    assert {m.device.type for _, m in module.scores["test"].items()} == {"meta"}
    assert dict(module.scores["val"].items())["asr"].seen.is_meta


def test_protocol_and_export():
    module = make(LookUp())
    assert module.product() is module.model
    assert module.protocol() == {"method": "bare", "head": "original", "labels": "none"}
    assert make(LookUp(with_head=False)).protocol()["head"] == "none"
    assert make().protocol()["head"] == "none"


def test_forward_is_the_model():
    module = make()
    module.model = LookUp()
    images = torch.full((2, 3, 2, 2), 3.0)
    assert module(images).argmax(1).tolist() == [3, 3]


def test_a_method_adds_to_its_protocol():
    class Told(Bare):
        needs = Needs(labels=("untrusted", "clean"), images="train")

        def details(self):
            return {"finished": False}

    module = Told()
    module.model = LookUp()
    assert module.protocol() == {
        "method": "bare",
        "head": "original",
        "labels": "untrusted + clean",
        "finished": False,
    }


def test_a_head_that_is_not_to_be_tested_is_told_and_refused(trainer):
    class Drawn(Bare):
        untested = "There is nothing to measure yet."

    module = Drawn()
    module.model = LookUp()
    assert module.protocol()["head"] == "untrained"
    with pytest.raises(ConfigError, match="nothing to measure yet"):
        evaluate(trainer, module, loader(*CLEAN))


@pytest.mark.parametrize("method", [method for _, method in methods()], ids=lambda m: m.__name__)
def test_what_is_final_is_not_replaced(method):
    final = {
        name: value
        for base in method.__mro__
        for name, value in vars(base).items()
        if getattr(value, "__final__", False)
    }
    assert {"protocol", "on_save_checkpoint", "on_load_checkpoint"} <= final.keys()
    assert {name: getattr(method, name) for name in final} == final
