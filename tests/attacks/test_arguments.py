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
        ({"rate": 0.0}, r"attack\.rate is 0\.0; it must be in \(0, 1\]"),
        ({"rate": -0.1}, r"attack\.rate is -0\.1; it must be in \(0, 1\]"),
        ({"rate": 1.01}, r"attack\.rate is 1\.01; it must be in \(0, 1\]"),
        ({"rate": float("nan")}, r"attack\.rate is nan; it must be in \(0, 1\]"),
        ({"target": -1}, r"attack\.target is -1; it must be an integer >= 0"),
        ({"target": 1.5}, r"attack\.target is 1\.5; it must be an integer >= 0"),
        ({"seed": -1}, r"attack\.seed is -1; it must be an integer >= 0"),
        ({"rate_base": "class"}, r"attack\.rate_base is 'class'; .* dataset, target_class"),
        (
            {"rate_base": "source_class"},
            r"attack\.rate_base is 'source_class'; it must be one of dataset, target_class$",
        ),
        ({"label_rule": "dirty"}, r"attack\.label_rule is 'dirty'; .* all_to_all, clean_label"),
        ({"quantize": "ceil"}, r"attack\.quantize is 'ceil'; .* round, floor, none"),
        (
            {"label_rule": "all_to_all", "rate_base": "target_class"},
            r"attack\.rate_base is 'target_class'; it must be dataset",
        ),
        (
            {"label_rule": "clean_label", "exclude_target": True},
            r"attack\.exclude_target is True; it must be false with label_rule clean_label",
        ),
        (
            {"label_rule": "all_to_all", "rate_base": "dataset", "exclude_target": True},
            r"attack\.exclude_target is True; it must be false with label_rule all_to_all",
        ),
    ],
)
def test_shared_arguments(attack, arguments, message):
    with pytest.raises(AttackError, match=message):
        attack(**arguments)


@pytest.mark.parametrize(
    ("attack", "arguments", "message"),
    [
        (BadNets, {"pattern": "red"}, r"attack\.pattern is 'red'; .* bw_anp, checker, white"),
        (BadNets, {"position": "middle"}, r"attack\.position is 'middle'; .* center"),
        (BadNets, {"patch_size": 2}, r"attack\.patch_size is 2; it must be an integer >= 3"),
        (BadNets, {"patch_size": 0, "pattern": "white"}, r"attack\.patch_size is 0; .* >= 1"),
        (Blend, {"alpha": 1.1}, r"attack\.alpha is 1\.1; it must be in \[0, 1\]"),
        (Blend, {"alpha": -0.1}, r"attack\.alpha is -0\.1; it must be in \[0, 1\]"),
        (Blend, {"image": "kitty"}, r"attack\.image is 'kitty'; .* noise_gauss, cartoon, or file:"),
        (Blend, {"image": "file:"}, r"attack\.image is 'file:'; .* file:PATH"),
        (Blend, {"image_seed": -1}, r"attack\.image_seed is -1; it must be an integer >= 0"),
        (SIG, {"delta": 0.0}, r"attack\.delta is 0\.0; it must be in \(0, 255\]"),
        (SIG, {"delta": 256.0}, r"attack\.delta is 256\.0; it must be in \(0, 255\]"),
        (SIG, {"frequency": 0.0}, r"attack\.frequency is 0\.0; it must be above 0"),
        (SIG, {"frequency": float("inf")}, r"attack\.frequency is inf; it must be above 0"),
        (SIG, {"variant": "sum"}, r"attack\.variant is 'sum'; .* mask_image"),
        (SIG, {"alpha": 0.3}, r"attack\.alpha is 0\.3; .* left out with variant additive"),
        (SIG, {"variant": "convex"}, r"attack\.alpha is None; .* \[0, 1\] with variant convex"),
        (SIG, {"variant": "bench_v1", "alpha": 2.0}, r"attack\.alpha is 2\.0; .* \[0, 1\]"),
        (WaNet, {"mode": "both"}, r"attack\.mode is 'both'; .* dynamic, static"),
        (WaNet, {"label_rule": "clean_label"}, r"label_rule is .*; .* all_to_one or all_to_all"),
        (WaNet, {"rate_base": "target_class"}, r"attack\.rate_base is .*; it must be dataset"),
        (WaNet, {"exclude_target": True}, r"exclude_target is True; .* false with mode dynamic"),
        (WaNet, {"strength": -0.1}, r"attack\.strength is -0\.1; it must be 0 or above"),
        (WaNet, {"grid_size": 1}, r"attack\.grid_size is 1; it must be an integer >= 2"),
        (WaNet, {"grid_rescale": 0.0}, r"attack\.grid_rescale is 0\.0; it must be above 0"),
        (WaNet, {"grid_seed": -1}, r"attack\.grid_seed is -1; it must be an integer >= 0"),
        (WaNet, {"cross_ratio": -1.0}, r"attack\.cross_ratio is -1\.0; .* \[0, 9\] with rate 0\.1"),
        (WaNet, {"rate": 0.4}, r"attack\.cross_ratio is 2\.0; .* \[0, 1\.5\] with rate 0\.4"),
        (BadNets, {"pattern": "htba"}, r"attack\.patch_size is 3; it must be an integer >= 4"),
        (BadNets, {"pattern_seed": -1}, r"attack\.pattern_seed is -1; .* >= 0"),
        (PhysicalBA, {"image": "fox"}, r"attack\.image is 'fox'; .* logo, .*, or file:PATH"),
        (PhysicalBA, {"apply_to": "clean"}, r"attack\.apply_to is 'clean'; .* all, poison"),
        (TaCT, {"rate": 1.5}, r"attack\.rate is 1\.5; it must be in \(0, 1\]"),
        (TaCT, {"source_class": 1}, r"attack\.source_class is 1; it must be another than target"),
        (TaCT, {"source_class": -1}, r"attack\.source_class is -1; .* integer >= 0"),
        (TaCT, {"cover_classes": [0, 5]}, r"attack\.cover_classes is \[0, 5\]; .* without source"),
        (TaCT, {"cover_classes": [5, 1]}, r"attack\.cover_classes is \[5, 1\]; .* and target"),
        (TaCT, {"cover_classes": [-2]}, r"attack\.cover_classes is -2; .* integer >= 0"),
        (TaCT, {"cover_classes": []}, r"attack\.cover_classes is \[\]; .* null or at least one"),
        (TaCT, {"cover_rate": 1.1}, r"attack\.cover_rate is 1\.1; it must be in \[0, 1\]"),
        (TaCT, {"rate_base": "class"}, r"attack\.rate_base is 'class'; .*, source_class"),
        (TaCT, {"image": "fox"}, r"attack\.image is 'fox'; .* white_square, .*, or file:PATH"),
        (AdaptiveBlend, {"rate_base": "source_class"}, r"attack\.rate_base is 'source_class'"),
        (AdaptiveBlend, {"cover_rate": -0.1}, r"attack\.cover_rate is -0\.1; .* \[0, 1\]"),
        (AdaptiveBlend, {"alpha_train": 1.1}, r"attack\.alpha_train is 1\.1; .* \[0, 1\]"),
        (AdaptiveBlend, {"alpha_test": -0.1}, r"attack\.alpha_test is -0\.1; .* \[0, 1\]"),
        (AdaptiveBlend, {"grid": 0}, r"attack\.grid is 0; it must be an integer >= 1"),
        (AdaptiveBlend, {"mask_rate": 1.0}, r"attack\.mask_rate is 1\.0; .* \[0, 1\) and leave"),
        (AdaptiveBlend, {"mask_rate": 0.98}, r"attack\.mask_rate is 0\.98; .* leave one square"),
        (AdaptiveBlend, {"mask_rate": -0.5}, r"attack\.mask_rate is -0\.5; .* in \[0, 1\)"),
        (AdaptiveBlend, {"image": "logo"}, r"attack\.image is 'logo'; .* cartoon, or file:PATH"),
        (AdaptivePatch, {"cover_rate": 2.0}, r"attack\.cover_rate is 2\.0; .* \[0, 1\]"),
        (AdaptivePatch, {"patches": []}, r"attack\.patches is \[\]; .* one patch or more"),
        (AdaptivePatch, {"test_patches": []}, r"attack\.test_patches is \[\]; .* one patch"),
        (AdaptivePatch, {"patches": ["fox"]}, r"attack\.patches is 'fox'; .* or file:PATH"),
        (AdaptivePatch, {"test_patches": ["fox"]}, r"attack\.test_patches is 'fox'"),
        (AdaptivePatch, {"alphas": [1.0]}, r"attack\.alphas is \[1\.0\]; .* 4 numbers in \[0, 1\]"),
        (AdaptivePatch, {"alphas": [1, 1, 1, 2]}, r"attack\.alphas is \[1, 1, 1, 2\]; .* \[0, 1\]"),
    ],
)
def test_own_arguments(attack, arguments, message):
    with pytest.raises(AttackError, match=message):
        attack(**arguments)


@pytest.mark.parametrize("rule", ["all_to_one", "clean_label"])
def test_target_outside_the_classes(rule):
    attack = BadNets(target=10, label_rule=rule)
    with pytest.raises(AttackError, match=r"attack\.target is 10; it must be in \[0, 9\]"):
        attack.plan(LABELS, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 10}, r"attack\.target is 10; it must be in \[0, 9\]"),
        ({"source_class": 10}, r"attack\.source_class is 10; it must be in \[0, 9\]"),
        ({"cover_classes": [5, 10]}, r"attack\.cover_classes is 10; it must be in \[0, 9\]"),
    ],
)
def test_classes_of_tact_outside_the_classes(arguments, message):
    with pytest.raises(AttackError, match=message):
        TaCT(**arguments).plan(LABELS, 10)


def test_a_source_class_without_images():
    message = r"attack\.source_class is 9; it must be a class that has training images"
    with pytest.raises(AttackError, match=message):
        TaCT(source_class=9).plan(LABELS[:9], 10)


def test_squares_that_do_not_divide_the_image():
    message = r"attack\.grid is 4; it must be a divisor of the image size 30"
    with pytest.raises(AttackError, match=message):
        AdaptiveBlend().make_trigger(30)


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
    with pytest.raises(AttackError, match=rf"attack\.{key} is 'file:gone\.png', which cannot be"):
        attack.make_trigger(32)


@pytest.mark.parametrize("attack", [PhysicalBA(), TaCT(), AdaptivePatch()])
def test_an_image_too_small_for_the_drawn_patches(attack):
    with pytest.raises(AttackError, match=r"attack\.input_size is 7; it must be an integer >= 8"):
        attack.make_trigger(7)


def test_all_to_all_does_not_mind_the_target():
    assert BadNets(target=10, label_rule="all_to_all").plan(LABELS, 10).target is None


def test_a_rate_that_gives_no_row():
    with pytest.raises(AttackError, match=r"attack\.rate is 0\.001; .* of the 100 in the dataset"):
        BadNets(rate=0.001).plan(LABELS, 10)
    with pytest.raises(AttackError, match=r"attack\.rate is 0\.01; .* 10 in the target_class"):
        SIG(rate=0.01).plan(LABELS, 10)


def test_no_row_in_the_pool():
    with pytest.raises(AttackError, match=r"attack\.target 9 .*clean_label leaves no row"):
        SIG(target=9).plan(LABELS[:9], 10)
    with pytest.raises(AttackError, match=r"attack\.target 0 .*all_to_one leaves no row"):
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
    message = r"attack\.patch_size is 9; it must be at most the image size 8"
    with pytest.raises(AttackError, match=message):
        BadNets(patch_size=9).make_trigger(8)


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
    with pytest.raises(AttackError, match=r"attack\.input_size is 0"):
        attack.make_trigger(0)
