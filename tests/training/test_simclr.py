"""SimCLR: its loss, what it reads, its schedule, its monitors."""

import math

import pytest
import torch
from lightning import Trainer
from torch.nn import functional as F

from bdclean.attacks import BadNets, TaCT
from bdclean.backbones import ModelInfo, build, load_model, save_model
from bdclean.backbones.head import KNNHead
from bdclean.data import ImageSet, Splits
from bdclean.data.datamodule import ImageDataModule
from bdclean.errors import ConfigError
from bdclean.functional.contrastive import nt_xent
from bdclean.training import SimCLR
from bdclean.types import ImageFacts

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS = ImageFacts(4, 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))


class TinyData(ImageDataModule):
    name, num_classes, input_size, mean, std = "tiny", 4, 8, FACTS.mean, FACTS.std

    def __init__(self, flipped_labels=False, attack=None, **settings):
        super().__init__(splits=Splits(probe=16, val=12), shuffle_seed=3, attack=attack, **settings)
        self.flipped_labels = flipped_labels

    def read_train(self):
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(108) % 4
        images = torch.randint(0, 60, (108, 3, 8, 8), generator=generator)
        images += 45 * labels[:, None, None, None]
        if self.flipped_labels:
            labels = labels.flip(0)
        return ImageSet(images.to(torch.uint8), labels)

    read_test = read_train


def make(**arguments):
    torch.manual_seed(2)
    return SimCLR(FACTS, **({"width": 4, "batch_size": 32, "warmup_epochs": 1} | arguments))


def fit(module, data, epochs=2, ckpt=None, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


class Watched(SimCLR):
    def training_step(self, batch, batch_idx):
        if batch_idx == 0 and self.current_epoch == 0:
            self.batch = batch
        loss = super().training_step(batch, batch_idx)
        self.rates = [*getattr(self, "rates", ()), self.trainer.optimizers[0].param_groups[0]["lr"]]
        return loss


@pytest.fixture
def watched():
    torch.manual_seed(2)
    module = Watched(FACTS, width=4, batch_size=32, warmup_epochs=1)
    fit(module, TinyData(), epochs=3)
    return module


def test_it_reads_two_views_of_whole_batches_and_no_label(watched):
    assert "label" not in watched.batch
    first, second = watched.batch["views"]
    assert first.shape == second.shape == (32, 3, 8, 8)
    assert not torch.equal(first, second)
    assert len(watched.rates) == 3 * (80 // 32)  # an incomplete batch is left out


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine(watched):
    warm = [0.12 * (step + 1) / 2 for step in range(2)]
    # lightly's ends at a thousandth of the rate, with the last step
    cosine = [0.12 * (0.001 + 0.999 * (1 + math.cos(math.pi * step / 3)) / 2) for step in range(4)]
    assert watched.rates == pytest.approx([*warm, *cosine])


def test_a_validation_by_itself_looks_at_the_monitors():
    module, data = make(), TinyData(attack=BadNets(target=1, rate=0.2, patch_size=3))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    (clean, triggered) = Trainer(**quiet).validate(module, data, verbose=False)
    assert {"val/probe_acc", "val/knn_acc"} <= clean.keys() | triggered.keys()


def test_a_resumed_fit_keeps_its_length(tmp_path):
    first = fit(make(), TinyData(), epochs=2)
    first.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="run is 4 steps long, and this one 6"):
        fit(make(), TinyData(), epochs=3, ckpt=tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="max_epochs=-1: the learning rate follows a schedule"):
        fit(make(), TinyData(), epochs=-1)


def test_the_loss_is_nt_xent_of_the_projected_views():
    module = make()
    module.log = lambda *_, **__: None
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2))
    ours = module.training_step({"views": views}, 0)
    again = make()
    z = again.projection(again.model.features(torch.cat(views)))
    assert torch.allclose(ours, nt_xent(*z.chunk(2), 0.5), atol=1e-6)


def test_labels_make_no_difference():
    one, other = make(), make()
    for module, flipped in ((one, False), (other, True)):
        data = TinyData(flipped)
        data.splits = Splits()  # the draw of roles may read labels
        fit(module, data)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_biases_and_batch_norms_have_no_weight_decay():
    module = make()
    trainer = fit(module, TinyData(), epochs=1)
    (optimizer,) = trainer.optimizers
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 5e-4
    assert free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len([*module.model.parameters(), *module.projection.parameters()])


def test_monitors_report_and_change_nothing():
    quiet, watched = make(), make()
    fit(quiet, TinyData())
    data = TinyData(attack=BadNets(target=1, rate=0.1, patch_size=3), validate_in_fit=True)
    trainer = fit(watched, data)
    names = {f"val/{m}_{key}" for m in ("probe", "knn") for key in ("acc", "asr", "pa")}
    assert names <= set(trainer.callback_metrics)
    clean = make()
    fit(clean, TinyData(validate_in_fit=True))
    for key, value in quiet.state_dict().items():
        if not key.startswith("monitor"):
            assert torch.equal(value, clean.state_dict()[key]), key


def test_monitors_look_at_the_further_sets_of_an_attack():
    attack = TaCT(source_class=0, cover_classes=[2], rate=0.1, cover_rate=0.05)
    trainer = fit(make(), TinyData(attack=attack, validate_in_fit=True), epochs=1)
    assert {"val/probe_leak", "val/knn_leak"} <= set(trainer.callback_metrics)


def test_monitors_need_labelled_images():
    data = TinyData(validate_in_fit=True)
    data.splits = Splits(val=12)
    with pytest.raises(ConfigError, match="probe"):
        fit(make(), data)


def test_the_product_is_a_backbone_without_a_head(tmp_path, watched):
    save_model(watched.product(), tmp_path / "f.safetensors")
    model = load_model(tmp_path / "f.safetensors").eval()
    assert model.head is None
    x = torch.rand(3, 3, 8, 8)
    assert torch.allclose(model.features(x), watched.model.eval().features(x), atol=1e-6)


def test_weights_are_a_start_and_lose_their_head(tmp_path):
    model = build(ModelInfo("resnet18", 4, 8, FACTS.mean, FACTS.std, width=4))
    save_model(model, tmp_path / "f.safetensors")
    module = SimCLR(FACTS, weights=str(tmp_path / "f.safetensors"))
    assert module.model.head is None
    assert torch.equal(module.model.backbone.conv1.weight, model.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"output_dim": 0}, "output_dim=0"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
    ],
)
def test_wrong_values_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        make(**wrong)


def test_nearest_neighbours_vote_as_written():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 5, generator=generator) for n in (40, 9))
    labels = torch.randint(0, 4, (40,), generator=generator)
    answers = KNNHead(bank, labels, 4, k=7, temperature=0.2)(queries).argmax(1)
    for query, answer in zip(queries, answers, strict=True):
        near = F.cosine_similarity(query[None], bank)
        votes = [0.0] * 4
        for i in near.argsort(descending=True)[:7].tolist():
            votes[labels[i]] += math.exp(near[i] / 0.2)
        assert votes.index(max(votes)) == answer


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0.0}])
def test_nearest_neighbours_refuse_wrong_numbers(wrong):
    with pytest.raises(ConfigError, match="nearest neighbours"):
        KNNHead(torch.rand(4, 2), torch.arange(4), 4, **wrong)


SCRIPT = """
import torch
from lightning import Trainer, seed_everything
from torch import distributed
from bdclean.data import Digits, Splits
from bdclean.training import SimCLR
from bdclean.types import ImageFacts

seed_everything(0)
data = Digits(splits=Splits(defense=1200, probe=60, val=40), validate_in_fit=True)
class Compared(SimCLR):
    def on_validation_start(self):
        super().on_validation_start()
        mine = {name: value.tolist() for name, value in self.monitors.state_dict().items()}
        monitors = [None, None]
        distributed.all_gather_object(monitors, mine)
        assert mine and monitors[0] == monitors[1], "the processes monitor with other features"

module = Compared(ImageFacts(10, 32, data.mean, data.std), width=4, batch_size=20, warmup_epochs=0)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, data)
rank = distributed.get_rank()
state = {name: value.tolist() for name, value in module.model.state_dict().items()}
states = [None, None]
distributed.all_gather_object(states, state)
assert states[0] == states[1]

z = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1))
whole = z.clone().requires_grad_()
from bdclean.functional.contrastive import nt_xent
single = nt_xent(*whole, 0.5)  # not gathered
single.backward()
mine = z[:, 6 * rank : 6 * rank + 6].clone().requires_grad_()
loss = module.loss(*mine)
loss.backward()
mean = loss.detach().clone()
distributed.all_reduce(mean)
assert torch.allclose(mean / 2, single.detach(), atol=1e-6), (mean / 2, single)
# DDP takes the mean of the gradients of both processes
assert torch.allclose(mine.grad / 2, whole.grad[:, 6 * rank : 6 * rank + 6], atol=1e-6)
assert whole.grad.abs().max() > 1e-3
if rank == 0:
    print("equal", sorted(k for k in trainer.callback_metrics))
"""


@pytest.mark.ddp
def test_two_processes_contrast_the_images_of_both(run_script):
    printed = run_script(SCRIPT)
    assert "equal" in printed
    assert "val/probe_acc" in printed
