"""Copies for attack loops."""

import pytest
import timm
import torch
from torch import nn

from bdclean.backbones import ModelInfo, SplitModel, build, frozen_copy

HALF = (0.5, 0.4, 0.3)


def _model(arch="resnet18", width=8):
    torch.manual_seed(0)
    model = build(ModelInfo(arch, 3, 32, HALF, HALF, width=width))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def _with_eps(eps):
    model = _model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return model


def _norms(module):
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


class Untraceable(nn.Module):
    """Its path depends on the values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x.mean((2, 3)) if x.sum() > -1e9 else x.amax((2, 3))


class Twice(nn.Module):
    """One convolution, used twice, with a batch norm for each use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x)))).mean((2, 3))


def _own(network, features):
    info = ModelInfo("resnet18", None, 32, HALF, HALF)
    return SplitModel(network, features, None, HALF, HALF, info)


@pytest.mark.parametrize(
    ("arch", "width", "left"),
    [("resnet18", 8, 0), ("mobilenet_v2", 8, 0), ("timm:resnet10t", 64, 0)],
)
def test_folded_features_equal_the_models(arch, width, left):
    model = _model(arch, width)
    x = torch.rand(4, 3, 32, 32)
    copy = frozen_copy(model)
    assert _norms(model) > 5
    assert _norms(copy) == left
    with torch.no_grad():
        torch.testing.assert_close(copy(x), model.eval().features(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_the_eps_of_each_norm_is_its_own(eps):
    model, x = _with_eps(eps), torch.rand(4, 3, 32, 32)
    copy = frozen_copy(model)
    wanted = model.eval().features(x)
    torch.testing.assert_close(copy(x), wanted, atol=1e-4, rtol=1e-4)
    copy.refresh_(model)
    torch.testing.assert_close(copy(x), wanted, atol=1e-4, rtol=1e-4)
    usual = frozen_copy(_with_eps(1e-5))(x)
    assert (usual - wanted).abs().max() > 1e-3  # or this test could not fail


@pytest.mark.parametrize("make", [_model, lambda: _own(Untraceable(), 4)], ids=["fold", "plain"])
def test_the_source_stays_bit_identical_and_in_its_mode(make):
    model = make()
    norms = _norms(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = frozen_copy(model)
    copy(torch.rand(4, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert _norms(model) == norms
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in copy.state_dict().values()}
    assert not own & theirs


def test_only_the_input_has_a_gradient_and_it_is_right():
    model = _model().eval()
    copy = frozen_copy(model)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert not any(module.training for module in copy.modules())
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    (folded,) = torch.autograd.grad(copy(x).square().sum(), x)
    (plain,) = torch.autograd.grad(model.features(x).square().sum(), x)
    torch.testing.assert_close(folded, plain, atol=1e-3 * plain.abs().max().item(), rtol=1e-3)


def test_convolutions_are_channels_last():
    copy = frozen_copy(_model())
    weights = [m.weight for m in copy.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 20
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize(
    ("arch", "size", "settings"),
    [
        ("vit_small_patch16_dinov3", 32, {"depth": 2}),
        ("eva02_tiny_patch14_224", 28, {"depth": 2}),
        ("beit_base_patch16_224", 32, {"depth": 2, "embed_dim": 48, "num_heads": 3}),
        ("swin_tiny_patch4_window7_224", 32, {"embed_dim": 24}),
    ],
)
def test_networks_whose_trace_holds_constants_are_copied_and_refreshed(arch, size, settings):
    """Of rotary and relative positions; Swin's have five dimensions."""
    torch.manual_seed(0)
    network = timm.create_model(arch, num_classes=0, img_size=size, **settings)
    model = _own(network, network.num_features).eval()
    copy = frozen_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    copy.refresh_(model)
    x = torch.rand(2, 3, size, size, requires_grad=True)
    ours, theirs = copy(x), model.features(x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(ours.square().sum(), x)
    (wanted,) = torch.autograd.grad(theirs.square().sum(), x)
    torch.testing.assert_close(gradient, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


class Cached(nn.Module):
    """A constant of the trace beside a batch norm that could be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return (self.bn(self.conv(x)) + 2 * self.shift).mean((2, 3))


def test_a_constant_of_the_trace_does_not_go_stale():
    model = _own(Cached(), 4).eval()
    copy = frozen_copy(model)
    model.backbone.shift.fill_(3)
    copy.refresh_(model)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(copy(x), model.features(x))


def test_a_network_whose_folding_fails_is_copied(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("bdclean.backbones.fold.fuse", broken)
    model = _model()
    copy = frozen_copy(model)
    x = torch.rand(2, 3, 32, 32)
    assert _norms(copy) == _norms(model)
    with torch.no_grad():
        torch.testing.assert_close(copy(x), model.eval().features(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("network", [Untraceable(), Twice()], ids=lambda n: type(n).__name__)
def test_what_cannot_be_folded_is_copied(network):
    model = _own(network, 4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    copy = frozen_copy(model)
    assert _norms(copy) == _norms(model)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    torch.testing.assert_close(copy(x), model.eval().features(x))
    (gradient,) = torch.autograd.grad(copy(x).sum(), x)
    assert gradient.abs().sum() > 0


def test_a_network_without_normalisation_is_taken_too():
    backbone = _model().backbone
    x = torch.randn(2, 3, 32, 32)
    copy = frozen_copy(backbone)
    with torch.no_grad():
        torch.testing.assert_close(copy(x), backbone.eval()(x), atol=1e-4, rtol=1e-4)


def test_low_precision_inside_float32_outside():
    model = _model()
    copy = frozen_copy(model, torch.bfloat16)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    features = copy(x)
    assert features.dtype == torch.float32
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.bfloat16}
    assert copy.normalize.mean.dtype == torch.float32
    (gradient,) = torch.autograd.grad(features.sum(), x)
    assert gradient.dtype == torch.float32
    reference = model.eval().features(x)
    assert (features - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize(
    "make",
    [_model, lambda: _model("timm:resnet10t", 64), lambda: _own(Twice(), 3)],
    ids=["own", "timm", "plain"],
)
def test_refresh_follows_the_model(make):
    model = make()
    copy = frozen_copy(model)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.train().features(x)  # running statistics move too
        expected = model.eval().features(x)
        assert not torch.allclose(copy(x), expected, atol=1e-3, rtol=1e-3)
        copy.refresh_(model)
        torch.testing.assert_close(copy(x), expected, atol=1e-4, rtol=1e-4)
