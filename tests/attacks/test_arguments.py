"""Wrong use: one AttackError that names the key, the value and what is allowed."""

import pytest
import torch

from bdclean.attacks import (
    SIG,
    AdaptiveBlend,
    AdaptivePatch,
    BadNets,
    Blend,
    LabelConsistent,
    PhysicalBA,
    TaCT,
    WaNet,
)
from bdclean.errors import AttackError

LABELS = torch.arange(100) % 10


@pytest.mark.parametrize("attack", [BadNets, Blend, SIG, LabelConsistent, WaNet, PhysicalBA])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, r"^rate=0\.0: it must be in \(0, 1\]"),
        ({"rate": -0.1}, r"^rate=-0\.1: it must be in \(0, 1\]"),
        ({"rate": 1.01}, r"^rate=1\.01: it must be in \(0, 1\]"),
        ({"rate": float("nan")}, r"^rate=nan: it must be in \(0, 1\]"),
        ({"target": -1}, r"^target=-1: it must be an integer >= 0"),
        ({"target": 1.5}, r"^target=1\.5: it must be an integer >= 0"),
        ({"seed": -1}, r"^seed=-1: it must be an integer >= 0"),
        ({"rate_base": "class"}, r"^rate_base=class: .* dataset, target_class"),
        (
            {"rate_base": "source_class"},
            r"^rate_base=source_class: it must be one of dataset, target_class\.$",
        ),
        ({"label_rule": "dirty"}, r"^label_rule=dirty: .* all_to_all, clean_label"),
        ({"quantize": "ceil"}, r"^quantize=ceil: .* round, floor, none"),
        (
            {"label_rule": "all_to_all", "rate_base": "target_class"},
            r"^rate_base=target_class: it must be dataset",
        ),
        (
            {"label_rule": "clean_label", "exclude_target": True},
            r"^exclude_target=True: it must be false with label_rule clean_label",
        ),
        (
            {"label_rule": "all_to_all", "rate_base": "dataset", "exclude_target": True},
            r"^exclude_target=True: it must be false with label_rule all_to_all",
        ),
    ],
)
def test_shared_arguments(attack, arguments, message):
    with pytest.raises(AttackError, match=message):
        attack(**arguments)


@pytest.mark.parametrize(
    ("attack", "arguments", "message"),
    [
        (BadNets, {"pattern": "red"}, r"^pattern=red: .* bw_anp, checker, white"),
        (BadNets, {"position": "middle"}, r"^position=middle: .* center"),
        (BadNets, {"patch_size": 2}, r"^patch_size=2: it must be an integer >= 3"),
        (BadNets, {"patch_size": 0, "pattern": "white"}, r"^patch_size=0: .* >= 1"),
        (Blend, {"alpha": 1.1}, r"^alpha=1\.1: it must be in \[0, 1\]"),
        (Blend, {"alpha": -0.1}, r"^alpha=-0\.1: it must be in \[0, 1\]"),
        (Blend, {"image": "kitty"}, r"^image=kitty: .* noise_gauss, cartoon, or file:"),
        (Blend, {"image": "file:"}, r"^image=file:: .* file:PATH"),
        (Blend, {"image_seed": -1}, r"^image_seed=-1: it must be an integer >= 0"),
        (SIG, {"delta": 0.0}, r"^delta=0\.0: it must be in \(0, 255\]"),
        (SIG, {"delta": 256.0}, r"^delta=256\.0: it must be in \(0, 255\]"),
        (SIG, {"frequency": 0.0}, r"^frequency=0\.0: it must be above 0"),
        (SIG, {"frequency": float("inf")}, r"^frequency=inf: it must be above 0"),
        (SIG, {"variant": "sum"}, r"^variant=sum: .* mask_image"),
        (SIG, {"alpha": 0.3}, r"^alpha=0\.3: .* left out with variant additive"),
        (SIG, {"variant": "convex"}, r"^alpha=None: .* \[0, 1\] with variant convex"),
        (SIG, {"variant": "bench_v1", "alpha": 2.0}, r"^alpha=2\.0: .* \[0, 1\]"),
        (WaNet, {"mode": "both"}, r"^mode=both: .* dynamic, static"),
        (WaNet, {"label_rule": "clean_label"}, r"label_rule=.*: .* all_to_one or all_to_all"),
        (WaNet, {"rate_base": "target_class"}, r"^rate_base=.*: it must be dataset"),
        (WaNet, {"exclude_target": True}, r"exclude_target=True: .* false with mode dynamic"),
        (WaNet, {"strength": -0.1}, r"^strength=-0\.1: it must be 0 or above"),
        (WaNet, {"grid_size": 1}, r"^grid_size=1: it must be an integer >= 2"),
        (WaNet, {"grid_rescale": 0.0}, r"^grid_rescale=0\.0: it must be above 0"),
        (WaNet, {"grid_seed": -1}, r"^grid_seed=-1: it must be an integer >= 0"),
        (WaNet, {"cross_ratio": -1.0}, r"^cross_ratio=-1\.0: .* \[0, 9\] with rate 0\.1"),
        (WaNet, {"rate": 0.4}, r"^cross_ratio=2\.0: .* \[0, 1\.5\] with rate 0\.4"),
        (BadNets, {"pattern": "htba"}, r"^patch_size=3: it must be an integer >= 4"),
        (BadNets, {"pattern_seed": -1}, r"^pattern_seed=-1: .* >= 0"),
        (PhysicalBA, {"image": "fox"}, r"^image=fox: .* logo, .*, or file:PATH"),
        (PhysicalBA, {"apply_to": "clean"}, r"^apply_to=clean: .* all, poison"),
        (TaCT, {"rate": 1.5}, r"^rate=1\.5: it must be in \(0, 1\]"),
        (TaCT, {"source_class": 1}, r"^source_class=1: it must be another class than target"),
        (TaCT, {"source_class": -1}, r"^source_class=-1: .* integer >= 0"),
        (TaCT, {"cover_classes": [0, 5]}, r"^cover_classes=\[0, 5\]: .* without source"),
        (TaCT, {"cover_classes": [5, 1]}, r"^cover_classes=\[5, 1\]: .* and target"),
        (TaCT, {"cover_classes": [-2]}, r"^cover_classes=-2: .* integer >= 0"),
        (TaCT, {"cover_classes": []}, r"^cover_classes=\[\]: .* null or at least one"),
        (TaCT, {"cover_rate": 1.1}, r"^cover_rate=1\.1: it must be in \[0, 1\]"),
        (TaCT, {"rate_base": "class"}, r"^rate_base=class: .*, source_class"),
        (TaCT, {"image": "fox"}, r"^image=fox: .* white_square, .*, or file:PATH"),
        (AdaptiveBlend, {"rate_base": "source_class"}, r"^rate_base=source_class"),
        (AdaptiveBlend, {"cover_rate": -0.1}, r"^cover_rate=-0\.1: .* \[0, 1\]"),
        (AdaptiveBlend, {"alpha_train": 1.1}, r"^alpha_train=1\.1: .* \[0, 1\]"),
        (AdaptiveBlend, {"alpha_test": -0.1}, r"^alpha_test=-0\.1: .* \[0, 1\]"),
        (AdaptiveBlend, {"grid": 0}, r"^grid=0: it must be an integer >= 1"),
        (AdaptiveBlend, {"mask_rate": 1.0}, r"^mask_rate=1\.0: .* \[0, 1\) and leave"),
        (AdaptiveBlend, {"mask_rate": 0.98}, r"^mask_rate=0\.98: .* leave one square"),
        (AdaptiveBlend, {"mask_rate": -0.5}, r"^mask_rate=-0\.5: .* in \[0, 1\)"),
        (AdaptiveBlend, {"image": "logo"}, r"^image=logo: .* cartoon, or file:PATH"),
        (AdaptivePatch, {"cover_rate": 2.0}, r"^cover_rate=2\.0: .* \[0, 1\]"),
        (AdaptivePatch, {"patches": []}, r"^patches=\[\]: .* one patch or more"),
        (AdaptivePatch, {"test_patches": []}, r"^test_patches=\[\]: .* one patch"),
        (AdaptivePatch, {"patches": ["fox"]}, r"^patches=fox: .* or file:PATH"),
        (AdaptivePatch, {"test_patches": ["fox"]}, r"^test_patches=fox"),
        (AdaptivePatch, {"alphas": [1.0]}, r"^alphas=\[1\.0\]: .* 4 numbers in \[0, 1\]"),
        (AdaptivePatch, {"alphas": [1, 1, 1, 2]}, r"^alphas=\[1, 1, 1, 2\]: .* \[0, 1\]"),
    ],
)
def test_own_arguments(attack, arguments, message):
    with pytest.raises(AttackError, match=message):
        attack(**arguments)


@pytest.mark.parametrize("rule", ["all_to_one", "clean_label"])
def test_target_outside_the_classes(rule):
    attack = BadNets(target=10, label_rule=rule)
    with pytest.raises(AttackError, match=r"^target=10: it must be in \[0, 9\]"):
        attack.plan(LABELS, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 10}, r"^target=10: it must be in \[0, 9\]"),
        ({"source_class": 10}, r"^source_class=10: it must be in \[0, 9\]"),
        ({"cover_classes": [5, 10]}, r"^cover_classes=10: it must be in \[0, 9\]"),
    ],
)
def test_classes_of_tact_outside_the_classes(arguments, message):
    with pytest.raises(AttackError, match=message):
        TaCT(**arguments).plan(LABELS, 10)


def test_a_source_class_without_images():
    message = r"^source_class=9: it must be a class that has training images"
    with pytest.raises(AttackError, match=message):
        TaCT(source_class=9).plan(LABELS[:9], 10)


def test_squares_that_do_not_divide_the_image():
    message = r"^grid=4: it must be a divisor of both sides of an image of 30x30"
    with pytest.raises(AttackError, match=message):
        AdaptiveBlend().make_trigger((30, 30))


@pytest.mark.parametrize(
    ("attack", "key"),
    [
        (Blend(image="file:gone.png"), "image"),
        (PhysicalBA(image="file:gone.png"), "image"),
        (TaCT(image="file:gone.png"), "image"),
        (AdaptiveBlend(image="file:gone.png"), "image"),
        (AdaptivePatch(patches=["file:gone.png"], alphas=[1.0]), "patches"),
        (AdaptivePatch(test_patches=["logo", "file:gone.png"]), "test_patches"),
    ],
)
def test_a_missing_picture(attack, key):
    with pytest.raises(AttackError, match=rf"^{key}=file:gone\.png: it cannot be read"):
        attack.make_trigger((32, 32))


@pytest.mark.parametrize("attack", [PhysicalBA(), TaCT(), AdaptivePatch()])
def test_an_image_too_small_for_the_drawn_patches(attack):
    with pytest.raises(AttackError, match=r"=.*: it must be used on images of 8x8 .* not 7x7"):
        attack.make_trigger((7, 7))


def test_all_to_all_does_not_mind_the_target():
    assert BadNets(target=10, label_rule="all_to_all").plan(LABELS, 10).target is None


def test_a_rate_that_gives_no_row():
    with pytest.raises(AttackError, match=r"^rate=0\.001: .* of the 100 in the dataset"):
        BadNets(rate=0.001).plan(LABELS, 10)
    with pytest.raises(AttackError, match=r"^rate=0\.01: .* 10 in the target_class"):
        SIG(rate=0.01).plan(LABELS, 10)


def test_no_row_in_the_pool():
    with pytest.raises(AttackError, match=r"^target=9: .*clean_label it leaves no row"):
        SIG(target=9).plan(LABELS[:9], 10)
    with pytest.raises(AttackError, match=r"^target=0: .*all_to_one it leaves no row"):
        BadNets(exclude_target=True).plan(torch.zeros(5, dtype=torch.int64), 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 10]), r"labels lie in \[0, 10\]; with 10 classes .* \[0, 9\]"),
        (torch.tensor([-1, 1]), r"labels lie in \[-1, 1\]"),
        (torch.tensor([0.0, 1.0]), "vector of integers"),
        (torch.zeros(2, 2, dtype=torch.int64), "vector of integers"),
        (torch.tensor([], dtype=torch.int64), "non-empty"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(AttackError, match=message):
        BadNets().plan(labels, 10)


def test_a_patch_larger_than_the_image():
    message = r"^patch_size=9: it must be at most the side of an image of 8x8"
    with pytest.raises(AttackError, match=message):
        BadNets(patch_size=9).make_trigger((8, 8))


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(),
        Blend(),
        SIG(),
        LabelConsistent(patch="corners4"),
        WaNet(),
        PhysicalBA(),
        TaCT(),
        AdaptiveBlend(),
        AdaptivePatch(),
    ],
)
def test_an_image_size_that_is_none(attack):
    with pytest.raises(AttackError, match=r"^size=\(0, 0\): it must be \(height, width\)"):
        attack.make_trigger((0, 0))
