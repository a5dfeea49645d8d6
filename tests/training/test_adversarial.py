"""Adversarial training: the ball, the network in the attack, and what is trained on."""

import copy

import pytest
import torch
from grouping import make_of
from lightning import Trainer
from torch.nn import functional as F

from bdclean.data.datamodule import ImageDataModule
from bdclean.data.images import ImageSet
from bdclean.data.splits import Splits
from bdclean.errors import ConfigError
from bdclean.training import AdversarialTraining, Supervised
from bdclean.types import ImageFacts

FACTS = ImageFacts(4, 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
pytestmark = [
    # Sixty images in memory need no worker processes.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 flattens containers with a class that newer torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]


class TinyData(ImageDataModule):
    name, num_classes, input_size, mean, std = "tiny", 4, 8, FACTS.mean, FACTS.std

    def __init__(self):
        super().__init__(splits=Splits(), shuffle_seed=3)

    def read_train(self):
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(64) % 4
        images = torch.randint(0, 60, (64, 3, 8, 8), generator=generator)
        images += 45 * labels[:, None, None, None]
        return ImageSet(images.to(torch.uint8), labels)

    read_test = read_train


def make(cls=AdversarialTraining, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make_of(cls, {"facts": FACTS, "width": 4, "batch_size": 32}, arguments)
        for _ in range(3):  # statistics that are not at their start
            module.model(torch.rand(32, 3, 8, 8))
    module.log = lambda *_, **__: None
    return module


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(32, 3, 8, 8, generator=generator)
    image[0], image[1] = 0.0, 1.0
    return {"image": image, "label": torch.arange(32) % 4, "index": torch.arange(32)}


def literal(network, x, y, eps, a, steps):
    x_i = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_i = x_i.detach().requires_grad_()
        F.cross_entropy(network(x_i), y).backward()
        moved = x_i.detach() + a * x_i.grad.sign()
        x_i = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return x_i


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_against_a_literal_transcription(batch, mode):
    module = make(pgd={"epsilon": 8, "steps": 4, "step_size": 3}, perturb_bn=mode)
    x, y = batch["image"], batch["label"]
    torch.manual_seed(4)
    ours = module.perturb(x, y)
    torch.manual_seed(4)
    network = copy.deepcopy(module.model).train(mode == "train")
    wanted = literal(network, x, y, 8 / 255, 3 / 255, 4)
    # folded batch norms give other last digits, so that the sign of a gradient near 0 may turn
    assert ((ours - wanted).abs() < 1e-5).float().mean() > 0.9


def test_images_stay_in_ball_and_box_and_the_network_as_it_was(batch):
    module = make(pgd={"epsilon": 8, "steps": 3, "step_size": 4})
    before = copy.deepcopy(module.model.state_dict())
    out = module.perturb(batch["image"], batch["label"])
    assert not out.requires_grad
    assert (out - batch["image"]).abs().max() <= 8 / 255 + 1e-6
    assert out.min() >= 0
    assert out.max() <= 1
    assert module.model.training
    assert all(p.grad is None for p in module.model.parameters())
    after = module.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_loss_is_that_of_the_adversarial_images(batch):
    module = make(pgd={"steps": 3}, label_smoothing=0.1)
    image = batch["image"].clone()
    torch.manual_seed(4)
    adversarial = module.perturb(image, batch["label"])
    wanted = F.cross_entropy(
        copy.deepcopy(module.model).train()(adversarial), batch["label"], label_smoothing=0.1
    )
    torch.manual_seed(4)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, wanted)
    assert torch.equal(batch["image"], image)
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())
    with torch.no_grad():
        clean = F.cross_entropy(module.model.eval()(image), batch["label"])
        raised = F.cross_entropy(module.model(adversarial), batch["label"])
    assert raised > clean


def test_the_perturbation_sees_the_present_weights(batch):
    module = make(pgd={"steps": 2})
    torch.manual_seed(4)
    first = module.perturb(batch["image"], batch["label"])
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.manual_seed(4)
    second = module.perturb(batch["image"], batch["label"])
    assert not torch.equal(first, second)
    fresh = make(pgd={"steps": 2})
    fresh.model.load_state_dict(module.model.state_dict())
    torch.manual_seed(4)
    torch.testing.assert_close(second, fresh.perturb(batch["image"], batch["label"]))


def test_half_precision_is_bfloat16_with_float32_images(batch):
    module = make(pgd={"steps": 3})
    with torch.autocast("cpu", torch.bfloat16):
        out = module.perturb(batch["image"], batch["label"])
    assert out.dtype == torch.float32
    assert {p.dtype for p in module._perturber._net.network.parameters()} == {torch.bfloat16}
    assert (out - batch["image"]).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        clean = F.cross_entropy(module.model.eval()(batch["image"]), batch["label"])
        raised = F.cross_entropy(module.model(out), batch["label"])
    assert raised > clean


def fit(module, tmp_path, epochs=2):
    del module.log  # the one of the tests
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    torch.manual_seed(9)
    trainer.fit(module, TinyData())
    return trainer


def test_with_an_empty_ball_it_is_supervised_training(tmp_path):
    ours, plain = make(pgd={"epsilon": 0.0}), make(Supervised)
    fit(ours, tmp_path)
    fit(plain, tmp_path)
    ours, plain = ours.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_a_checkpoint_and_the_record_name_the_ball(tmp_path):
    module = make(pgd={"epsilon": 4, "steps": 2, "step_size": 1})
    trainer = fit(module, tmp_path, epochs=1)
    assert module.protocol() == {
        "head": "original",
        "labels": "train",
        "method": "adversarial_training",
        "epsilon": 4,
        "pgd_steps": 2,
        "step_size": 1,
    }
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = AdversarialTraining.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.pgd == module.pgd
    assert torch.equal(again.model.head.weight, module.model.head.weight)


def test_wrong_use(batch):
    with pytest.raises(ConfigError, match="steps=0: it must be at least 1"):
        make(pgd={"steps": 0})
    with pytest.raises(ConfigError, match="epsilon=-1"):
        make(pgd={"epsilon": -1})
    with pytest.raises(ConfigError, match="perturb_bn='batch'"):
        make(perturb_bn="batch")
    del batch["label"]
    with pytest.raises(ConfigError, match="needs labels"):
        make().training_step(batch, 0)
