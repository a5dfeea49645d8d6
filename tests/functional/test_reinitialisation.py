import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from bdclean.errors import ConfigError, WeightsError
from bdclean.functional import (
    block_ratios,
    element_mask,
    maskable_count,
    maskable_tensors,
    mix_weights_,
    overall_fraction,
)

PUBLISHED = [0.01, 0.01, 0.01, 0.03, 0.03, 0.09, 0.09, 0.27, 0.27, 0.10]
GROUPS = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]


def resnet18(num_classes=10, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def stages(net):
    blocks = [b for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for b in layer]
    return [net.conv1, *blocks, net.fc]


@pytest.fixture(scope="module")
def sizes():
    return [maskable_count(stage) for stage in stages(resnet18())]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed, bias=True):
    """A network with everything that has to be told apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=bias),
            nn.BatchNorm2d(8),
            nn.Sequential(nn.ConvTranspose2d(8, 4, 2), nn.GroupNorm(2, 4)),
            nn.Linear(40, 50),
            nn.LayerNorm(50),
            nn.Embedding(5, 6),
        )
        for tensor in (*net.parameters(), net[1].running_mean, net[1].running_var):
            nn.init.normal_(tensor)
    return net


MIXED = {"0.weight", "0.bias", "2.0.weight", "2.0.bias", "3.weight", "3.bias"}


def test_mask_has_the_asked_share_and_comes_from_the_generator():
    mask = element_mask((400, 250), 0.27, generator())
    assert mask.dtype == torch.bool
    assert mask.shape == (400, 250)
    assert mask.sum().item() == pytest.approx(27_000, abs=5 * (1e5 * 0.27 * 0.73) ** 0.5)
    assert torch.equal(mask, element_mask((400, 250), 0.27, generator()))
    assert not torch.equal(mask, element_mask((400, 250), 0.27, generator(1)))
    assert not element_mask((100, 100), 0.0, generator()).any()
    assert element_mask((100, 100), 1.0, generator()).all()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ConfigError, match="ratio is"):
        element_mask((2,), ratio, generator())


def test_maskable_tensors_go_by_type_of_layer():
    assert {name for name, _ in maskable_tensors(small(0))} == MIXED
    assert [name for name, _ in maskable_tensors(nn.Linear(2, 3))] == ["weight", "bias"]


def test_resnet18_has_22_maskable_tensors(sizes):
    assert len(list(maskable_tensors(resnet18()))) == 22
    assert sum(sizes) == maskable_count(resnet18()) == 11_164_362


def test_attention_of_torchvision_is_maskable():
    net = VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
    names = {name for name, _ in maskable_tensors(net)}
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert {f"{attention}.in_proj_weight", f"{attention}.out_proj.weight"} <= names
    assert not any("ln" in name or name in {"class_token", "pos_embedding"} for name in names)
    assert maskable_count(net) == sum(p.numel() for _, p in maskable_tensors(net))


def test_ratio_0_keeps_and_ratio_1_replaces_all_but_norms():
    for ratio in (0.0, 1.0):
        student, fresh = small(0), small(1)
        teacher = copy.deepcopy(student.state_dict())
        changed, total = mix_weights_(student, fresh, ratio, generator())
        expected = fresh.state_dict()
        for name, value in student.state_dict().items():
            source = expected if ratio == 1 and name in MIXED else teacher
            assert torch.equal(value, source[name]), name
        assert total == maskable_count(student)
        assert changed == ratio * total


def test_mixing_follows_the_mask_elementwise_without_rescaling():
    student, fresh = small(0), small(1)
    teacher, news = copy.deepcopy(student.state_dict()), copy.deepcopy(fresh.state_dict())
    changed, _ = mix_weights_(student, fresh, 0.4, generator(3))
    replay, count = generator(3), 0
    for name, value in maskable_tensors(student):
        mask = element_mask(value.shape, 0.4, replay)
        assert torch.equal(value[mask], news[name][mask])
        assert torch.equal(value[~mask], teacher[name][~mask])
        expected = 0.4 * value.numel()
        assert abs(mask.sum().item() - expected) <= 5 * (expected * 0.6) ** 0.5
        count += mask.sum().item()
    assert changed == count
    assert all(torch.equal(v, news[k]) for k, v in fresh.state_dict().items())
    assert all(p.requires_grad and p.grad_fn is None for p in student.parameters())


def test_networks_of_another_structure_are_refused_untouched():
    student = small(0)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(WeightsError, match=r"first of which is '0\.bias'"):
        mix_weights_(student, small(1, bias=False), 1.0, generator())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    with pytest.raises(WeightsError, match="'bias'"):
        mix_weights_(nn.Linear(2, 3), nn.Linear(2, 4), 1.0, generator())


def test_whole_resnet18_is_redrawn_by_the_published_share(sizes):
    student, fresh = resnet18(seed=0), resnet18(seed=1)
    before = copy.deepcopy(student.state_dict())
    draw = generator()
    ratios = block_ratios("increasing", GROUPS, sizes)
    counts = [
        mix_weights_(old, new, ratio, draw)
        for old, new, ratio in zip(stages(student), stages(fresh), ratios, strict=True)
    ]
    assert abs(sum(changed for changed, _ in counts) - 2_471_401) <= 6_800
    assert sum(total for _, total in counts) == 11_164_362
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # Of the ten elements of the last bias, by chance, none may have been drawn.
    assert moved | {"fc.bias"} == {name for name, _ in maskable_tensors(student)}


def test_increasing_gives_the_published_ratios(sizes):
    ratios = block_ratios("increasing", GROUPS, sizes)
    assert ratios == pytest.approx(PUBLISHED)
    assert overall_fraction(ratios, sizes) == pytest.approx(0.2214, abs=5e-5)
    exact = sum(r * n for r, n in zip(PUBLISHED, sizes, strict=True))
    assert exact == pytest.approx(2_471_401, abs=1)


def test_the_share_with_43_classes():
    sizes = [maskable_count(stage) for stage in stages(resnet18(num_classes=43))]
    ratios = block_ratios("increasing", GROUPS, sizes)
    assert overall_fraction(ratios, sizes) == pytest.approx(0.2212, abs=5e-5)


def test_uniform_spends_the_same_budget_everywhere(sizes):
    ratios = block_ratios("uniform", GROUPS, sizes)
    assert len(set(ratios)) == 1
    assert ratios[0] == pytest.approx(0.2214, abs=5e-5)


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(1.5, [0.631, 0.421, 0.280, 0.187]), (2.0, [1.0, 0.633, 0.316, 0.158])],
)
def test_decreasing_spends_the_same_budget_from_the_other_end(sizes, gamma, expected):
    ratios = block_ratios("decreasing", GROUPS, sizes, gamma=gamma)
    assert ratios[1:9:2] == pytest.approx(expected, abs=6e-4)
    assert ratios[2:9:2] == ratios[1:9:2]
    assert ratios[0] == ratios[1]
    assert ratios[-1] == 0.10
    budget = overall_fraction(block_ratios("increasing", GROUPS, sizes), sizes)
    assert overall_fraction(ratios, sizes) == pytest.approx(budget, abs=1e-9)


def test_single_stage_and_none(sizes):
    uniform = block_ratios("uniform", GROUPS, sizes)[0]
    third = block_ratios("single_stage", GROUPS, sizes, single_group=2)
    assert third == [0, 0, 0, 0, 0, uniform, uniform, 0, 0, 0]
    assert block_ratios("none", GROUPS, sizes) == [0] * 10


def test_strength_scales_all_ratios_and_is_capped(sizes):
    assert block_ratios("increasing", GROUPS, sizes, strength=2.0) == pytest.approx(
        [2 * r for r in PUBLISHED]
    )
    strong = block_ratios("increasing", GROUPS, sizes, strength=10.0)
    assert strong == pytest.approx([min(1.0, 10 * r) for r in PUBLISHED])
    assert block_ratios("uniform", GROUPS, sizes, strength=0.0) == [0] * 10


def test_only_the_order_of_the_groups_counts(sizes):
    spaced = [0, 0, 0, 1, 1, 4, 4, 9, 9, 9]  # a stem at the resolution of the first blocks
    assert block_ratios("increasing", spaced, sizes) == pytest.approx(PUBLISHED)


def test_depth_of_other_networks():
    seven = block_ratios("increasing", range(9), [10] * 9)
    middle = [0.01 * 27 ** (s / 6) for s in range(7)]
    assert seven == pytest.approx([0.01, *middle, 0.10])
    assert block_ratios("increasing", [0, 1, 2], [5, 5, 5]) == pytest.approx([0.01, 0.27, 0.10])
    headless = block_ratios("increasing", [0, 1, 2], [5, 5, 5], has_head=False)
    assert headless == pytest.approx([0.01, 0.01, 0.27])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"strategy": "adaptive"}, "strategy is 'adaptive'"),
        ({"gamma": 0.5}, "gamma is 0.5"),
        ({"strategy": "single_stage", "single_group": 4}, "single_group is 4.*0 to 3"),
        ({"strength": -1}, "strength is -1"),
        ({"sizes": [1, 2]}, "10 groups meet 2 sizes"),
        ({"sizes": [0] * 10}, "sizes are"),
        ({"groups": [0, 2, 1, 1, 1, 1, 1, 1, 1, 1]}, "must not fall"),
        ({"groups": [0, 1], "sizes": [4, 4]}, "2 blocks are too few"),
    ],
)
def test_wrong_settings_are_named(change, text):
    arguments = {"strategy": "increasing", "groups": GROUPS, "sizes": [4] * 10} | change
    with pytest.raises(ConfigError, match=text):
        block_ratios(**arguments)
