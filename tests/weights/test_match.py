"""Names of files against names of models."""

import time

import pytest
import torch

from bdclean.weights import match, places, unwrap


def _zeros(*names, shape=(2,)):
    return {name: torch.zeros(shape) for name in names}


def _unwrap(found, expected):
    best = max(places(found, expected), key=lambda place: place.fits)
    return unwrap(found, best.prefix)


def test_reports_each_kind_with_counts_and_first_names():
    expected = _zeros("a", "b", "c")
    found = {"a": torch.zeros(3), "b": torch.zeros(2), **_zeros(*(f"x{i}" for i in range(7)))}
    report = match(expected, found)
    assert not report.ok
    assert report.missing == ("c",)
    assert report.unexpected == tuple(f"x{i}" for i in range(7))
    assert report.message() == (
        "1 missing (c); 7 unexpected (x0, x1, x2, x3, x4, ...); "
        "1 misshaped (a: float32 (3,) instead of float32 (2,))"
    )


def test_equal_names_and_shapes_are_ok():
    report = match(_zeros("a"), _zeros("a"))
    assert report.ok
    assert report.message() == ""


def test_other_precision_fits_but_whole_numbers_do_not():
    assert match(_zeros("a"), {"a": torch.zeros(2, dtype=torch.float16)}).ok
    report = match(_zeros("a"), {"a": torch.zeros(2, dtype=torch.int8)})
    assert report.misshaped == ("a: int8 (2,) instead of float32 (2,)",)


def test_num_batches_tracked_may_be_absent_but_nothing_else():
    expected = {**_zeros("bn.running_mean"), "bn.num_batches_tracked": torch.tensor(0)}
    assert match(expected, _zeros("bn.running_mean")).ok
    report = match(expected, {"bn.num_batches_tracked": torch.tensor(0)})
    assert report.missing == ("bn.running_mean",)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "model.", "encoder.", "module.model.backbone."]
)
def test_unwrap_takes_the_wrappers_off(prefix):
    names = ("conv1.weight", "bn1.bias")
    inside, outside = _unwrap(_zeros(*(prefix + name for name in names)), _zeros(*names))
    assert tuple(inside) == names
    assert outside == {}


def test_unwrap_keeps_a_wrapper_name_that_the_model_itself_has():
    names = ("encoder.layers.0.weight", "conv.weight")
    inside, _ = _unwrap(_zeros(*names), _zeros(*names))
    assert tuple(inside) == names


def test_unwrap_separates_what_lies_beside():
    found = _zeros("model.backbone.conv.weight", "model.head.weight", "queue")
    inside, outside = _unwrap(found, _zeros("conv.weight"))
    assert tuple(inside) == ("conv.weight",)
    assert tuple(outside) == ("head.weight", "queue")


def test_unwrap_never_loses_a_tensor():
    found = _zeros("backbone.conv.weight", "backbone.fc.weight", "fc.weight", "model.fc.weight")
    inside, outside = _unwrap(found, _zeros("conv.weight"))
    assert tuple(inside) == ("conv.weight", "fc.weight")
    assert tuple(outside) == ("fc.weight", "model.fc.weight")


def test_the_names_of_a_file_are_shown_as_escapes():
    report = match({}, {"x\n\x1b[2Jbdclean: all fits": torch.zeros(1)})
    assert report.message() == r"1 unexpected (x\n\x1b[2Jbdclean: all fits)"


def test_places_are_found_by_names_and_shapes():
    expected = {"conv.weight": torch.zeros(3, 2), "bn.bias": torch.zeros(3)}
    found = {
        "a.b.conv.weight": torch.zeros(3, 2),
        "a.b.bn.bias": torch.zeros(3),
        "ema.conv.weight": torch.zeros(5, 2),
        "a.b.head.weight": torch.zeros(2),
    }
    assert [(place.prefix, place.fits, place.names) for place in places(found, expected)] == [
        ("a.b.", 2, 2),
        ("ema.", 0, 1),
    ]


def test_counters_of_batch_norm_do_not_count():
    counter = {"bn.num_batches_tracked": torch.tensor(0)}
    assert places(counter, counter) == []


def test_another_spelling_is_found_and_numbered():
    expected = _zeros("features.0.weight")
    found = _zeros("net.features.module.0.weight")
    spellings = (str, lambda name: name.replace(".module", ""))
    (place,) = places(found, expected, spellings)
    assert (place.prefix, place.spelling) == ("net.", 1)


@pytest.mark.parametrize(
    "prefix",
    ["module." * 40_000, "x" * 300_000 + ".", "." * 300_000, "a." * 100_000, "conv." * 60_000],
)
def test_names_of_any_length_take_time_in_proportion(prefix):
    expected = _zeros("conv.weight", "layer.0.conv.weight")
    found = _zeros(*(f"{prefix}{number}.conv.weight" for number in range(20)))
    begun = time.process_time()
    found |= _zeros(f"{prefix}layer.0.conv.weight")
    votes = {place.prefix: place.fits for place in places(found, expected)}
    assert votes[prefix] == 1
    inside, _ = unwrap(found, prefix)
    assert "layer.0.conv.weight" in inside
    assert time.process_time() - begun < 2
