"""The attacks that every shared test of attacks runs on: all of the room, found by themselves."""

import inspect

import pytest
import torch
from torch import nn

import bdclean.attacks
from bdclean.attacks import (
    SIG,
    AdaptiveBlend,
    AdaptivePatch,
    Attack,
    BadNets,
    Blend,
    InputAware,
    LabelConsistent,
    PhysicalBA,
    TaCT,
    WaNet,
)
from bdclean.attacks.input_aware import InputAwareTrigger, TriggerGenerator

TYPES = {
    found
    for _, found in inspect.getmembers(bdclean.attacks, inspect.isclass)
    if issubclass(found, Attack) and found is not Attack
}
# No two of them have the same trigger.
CHOSEN: dict[str, Attack] = {
    "badnets": BadNets(),
    "badnets_white_center": BadNets(
        pattern="white", position="center", patch_size=6, exclude_target=True
    ),
    "badnets_htba": BadNets(pattern="htba", patch_size=8),
    "blend_noise": Blend(),
    "blend_gauss": Blend(image="noise_gauss", alpha=0.37),
    "blend_cartoon": Blend(image="cartoon", quantize="floor"),
    "blend_all_to_all": Blend(label_rule="all_to_all", image_seed=2),
    "sig_additive": SIG(delta=60),
    "sig_convex": SIG(variant="convex", alpha=0.3, rate_base="dataset", label_rule="all_to_one"),
    "sig_bench_v1": SIG(variant="bench_v1", alpha=0.3, quantize="floor"),
    "sig_mask_image": SIG(variant="mask_image", alpha=0.3),
    "label_consistent": LabelConsistent(),
    "label_consistent_corners": LabelConsistent(patch="corners4"),
    "label_consistent_faint": LabelConsistent(patch="corners4_same", amplitude=0.25),
    "wanet": WaNet(),
    "wanet_strong": WaNet(
        mode="static", strength=1.5, grid_size=6, grid_rescale=0.98, quantize="floor"
    ),
    "physical": PhysicalBA(),
    "physical_poison": PhysicalBA(image="emblem", apply_to="poison"),
    "tact": TaCT(),
    "tact_color_square": TaCT(image="color_square", quantize="floor"),
    "adaptive_blend": AdaptiveBlend(alpha_train=0.15),
    "adaptive_patch": AdaptivePatch(),
    "adaptive_patch_toolbox": AdaptivePatch(
        patches=["emblem", "logo"], alphas=[0.5, 0.2], test_patches=["emblem_pair", "corners4"]
    ),
}
MORE = TYPES - {type(attack) for attack in CHOSEN.values()} - {InputAware}
ATTACKS = CHOSEN | {cls.__name__: cls() for cls in sorted(MORE, key=str)}
LEARNED_SIZE = 16  # the only image size of the input-aware trigger made here
INPUT_AWARE = ["input_aware", "input_aware_learned"]
STATIC = [name for name, attack in ATTACKS.items() if not attack.dynamic]


def _network(channels: int, seed: int) -> TriggerGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = TriggerGenerator(channels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        for layer in made.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # takes the statistics of this batch, as if it had trained
        made(torch.rand(16, 3, LEARNED_SIZE, LEARNED_SIZE))
    return made


@pytest.fixture(scope="session")
def learned_trigger(tmp_path_factory):
    """The file of an input-aware trigger with random weights."""
    path = tmp_path_factory.mktemp("learned") / "trigger.safetensors"
    InputAwareTrigger(_network(3, 1), _network(1, 2), LEARNED_SIZE).save(path)
    return str(path)


def _named(request):
    if request.param == "input_aware":
        return InputAware()
    if request.param == "input_aware_learned":
        file = request.getfixturevalue("learned_trigger")
        return InputAware(rate=0.04, cover_rate=0.03, trigger=file)  # its networks take time
    return ATTACKS[request.param]


@pytest.fixture
def attacks():
    """All attacks whose trigger fits any image size, by name."""
    return ATTACKS


@pytest.fixture(params=ATTACKS)
def attack(request):
    """Each attack whose trigger fits any image size."""
    return ATTACKS[request.param]


@pytest.fixture(params=[*ATTACKS, *INPUT_AWARE])
def any_attack(request):
    """Each attack."""
    return _named(request)


@pytest.fixture(params=[*STATIC, "input_aware_learned"])
def static_attack(request):
    """Each attack that has fixed training rows; all take images of 16 pixels."""
    return _named(request)


@pytest.fixture(params=sorted(TYPES, key=str), ids=lambda cls: cls.__name__)
def attack_type(request):
    """Each class of attacks."""
    return request.param
