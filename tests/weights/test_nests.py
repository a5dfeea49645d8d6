"""State dicts wherever they lie in what a torch file holds."""

import time

import pytest
import torch

from bdclean.weights.nests import find_nests

STATE = {"b.weight": torch.ones(3, 4), "a": torch.arange(5)}


def _deep(levels):
    content = STATE
    for _ in range(levels):
        content = {"x": content}
    return content


def test_all_are_found_the_outer_ones_first():
    content = {"t": torch.ones(1), "a": {"b": STATE, "n": 3}, "c": [1, (STATE | {"z": 1},)]}
    nests = find_nests(content)
    assert [nest.where for nest in nests] == ["", "a.b", "c.1.0"]
    assert [tuple(nest.tensors) for nest in nests] == [("t",), tuple(STATE), tuple(STATE)]
    assert [nest.others for nest in nests] == [("a", "c"), (), ("z",)]


def test_entries_that_are_no_plain_tensors_are_named():
    odd = {"sparse": torch.eye(2).to_sparse(), "meta": torch.ones(2, device="meta"), "n": None}
    (nest,) = find_nests({"w": torch.ones(1), "p": torch.nn.Parameter(torch.ones(1)), **odd})
    assert tuple(nest.tensors) == ("w", "p")
    assert nest.others == tuple(odd)


@pytest.mark.parametrize(
    "content",
    [
        None,
        3,
        "text",
        [],
        {},
        {"a": 1},
        {(1, 2): torch.ones(1)},
        {"a": {}},
        torch.ones(1),
        [torch.ones(1)],
    ],
)
def test_what_holds_no_state_dict_gives_none(content):
    assert find_nests(content) == []


def test_the_state_of_an_optimizer_is_no_state_dict():
    assert find_nests({"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1}]}) == []


def test_a_dict_that_holds_itself_is_looked_at_once():
    content = {"net": STATE}
    content["self"], content["net again"] = content, STATE
    content["list"] = [content]
    assert [nest.where for nest in find_nests(content)] == ["net"]


def test_the_depth_is_bounded():
    assert [nest.where for nest in find_nests(_deep(8))] == [".".join("x" * 8)]
    assert find_nests(_deep(9)) == []
    assert find_nests(_deep(100_000)) == []


def test_time_and_names_stay_in_proportion():
    begun = time.process_time()
    wide = {str(number): {"x": {}} for number in range(100_000)}
    long = {"x" * 300_000: {"y" * 300_000: STATE}}
    assert find_nests(wide) == []
    assert [len(nest.where) for nest in find_nests(long)] == [161]
    assert time.process_time() - begun < 5
