"""Networks in memory: taken apart and put together."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from bdclean.backbones import ordered_blocks
from bdclean.backbones.apart import joined
from bdclean.backbones.live import LiveSource, split_live, unwrapped
from bdclean.errors import ConfigError
from bdclean.purification.bcu import BCU
from bdclean.types import ImageFacts


class Own(nn.Module):
    """A linear layer before the last one, and names of its own."""

    def __init__(self, classes=6, bias=True, tail=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.answer = nn.Linear(5, classes, bias=bias)  # before the other one in the state dict
        self.hidden = nn.Linear(4, 5)
        self.tail = tail or nn.Identity()

    def forward(self, x):
        return self.tail(self.answer(self.hidden(self.stem(x).mean((2, 3))).relu()))


class Maps(Own):
    def forward(self, x):
        return self.stem(x)


class Scaled(Own):
    """Its logits are changed in place."""

    def forward(self, x):
        return super().forward(x).mul_(2)


class Uncopied(Own):
    def __deepcopy__(self, memo):
        raise TypeError("not me")


class Normed(Own):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.answer)


FACTS = {"input_size": 8, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


@pytest.mark.parametrize("bias", [True, False])
def test_a_network_of_ones_own_comes_apart_and_together(bias):
    network = Own(bias=bias).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model = split_live(network, num_classes=6, **FACTS)
    assert model.info.num_classes == 6
    assert model.head.in_features == 5
    pixels = torch.rand(4, 3, 8, 8)
    normalised = (pixels - torch.tensor(FACTS["mean"])[:, None, None]) / torch.tensor(FACTS["std"])[
        :, None, None
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), network.eval()(normalised))
        network.train()
        for parameter in model.parameters():
            parameter.add_(0.1)
    whole = joined(network, model)
    assert isinstance(whole, Own)
    assert whole.training
    assert whole.state_dict().keys() == before.keys()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), whole.eval()(normalised))
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert network.training


def test_a_source_hands_out_copies():
    source = LiveSource(split_live(Own(), **FACTS))
    first, second = source.load(), source.load()
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.abs().sum() > 0
    assert first.training


def test_facts_of_libraries_are_known():
    vit = split_live(
        timm.create_model("vit_tiny_patch16_224", num_classes=6, img_size=32), input_size=32
    )
    assert vit.info.mean == (0.5, 0.5, 0.5)
    theirs = split_live(torchvision.models.shufflenet_v2_x0_5(num_classes=6), input_size=32)
    assert theirs.info.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("network", "facts", "message"),
    [
        (Own(), {}, "input_size, mean, std: give what Own takes"),
        (Own(), {**FACTS, "num_classes": 7}, "num_classes=7: Own has 6 outputs"),
        (
            Own(tail=nn.Softmax(1)),
            FACTS,
            "Own: its output is not what one of its linear",
        ),
        (
            Own(),
            {**FACTS, "input_size": 2},
            r"Own does not take images of shape \(2, 3, 2",
        ),
        (nn.Conv2d(3, 6, 8), FACTS, "Conv2d: the network has no linear layer within"),
        (Maps(), FACTS, r"Maps: its output for two images has the shape \(2, 4, 6, 6\)"),
        (Scaled(), FACTS, "Scaled: its output is not what one of its linear layers gives"),
        (Uncopied(), FACTS, "Uncopied: the network cannot be copied by copy.deepcopy .not me."),
        (Normed(), FACTS, "Normed: the weights of its head answer are computed from others"),
    ],
)
def test_what_does_not_fit_is_told(network, facts, message):
    with pytest.raises(ConfigError, match=message):
        split_live(network, **facts)


class Named(Own):
    """Its head has two names, of which the network calls the later one."""

    def __init__(self):
        super().__init__()
        self.zz = self.answer

    def forward(self, x):
        return self.zz(self.hidden(self.stem(x).mean((2, 3))).relu())


class Writing(Own):
    """Writes into the images that it gets."""

    def forward(self, x):
        return super().forward(x.sub_(0.3))


@pytest.mark.parametrize("make", [Named, Writing])
def test_odd_networks_come_apart_and_together(make):
    network = make().eval()
    model = split_live(network, **FACTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        pixels = torch.rand(4, 3, 8, 8)
        whole = joined(network, model)
        assert whole.state_dict().keys() == network.state_dict().keys()
        torch.testing.assert_close(model(pixels), whole(model.normalize(pixels)))


def test_wrappers_are_looked_into():
    network = Own()
    compiled = torch.compile(nn.DataParallel(network), backend="eager")
    assert unwrapped(compiled) is network
    assert unwrapped(network) is network


def test_bcu_draws_blocks_of_a_network_in_memory_anew_and_imports_nothing():
    """Its class is called like a module that is there, and cannot be made by its name."""

    class this(Own):  # noqa: N801
        def __init__(self):
            super().__init__()
            steps = (nn.Sequential(nn.Conv2d(k, 4, 3, padding=1), nn.ReLU()) for k in (3, 4, 4))
            self.stem = nn.Sequential(*steps)

    model = split_live(this(), **FACTS)
    student = BCU(ImageFacts(6, 8, FACTS["mean"], FACTS["std"])).make_student(model.copy())
    old, new = (ordered_blocks(each)[-2] for each in (model, student))
    pairs = list(zip(old.parameters(), new.parameters(), strict=True))
    assert sum(int((a != b).sum()) for a, b in pairs) > 0.1 * sum(a.numel() for a, _ in pairs)
    resnet = split_live(torchvision.models.resnet18(num_classes=6), input_size=32)
    assert len(ordered_blocks(resnet)) == 10
