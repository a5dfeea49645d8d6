import pytest
import torch

from bdclean.functional.finite import odd_tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_odd_tensor_is_named(value):
    good = {"a": torch.ones(2), "count": torch.tensor([1])}
    assert odd_tensor(good) is None
    odd = torch.tensor([[0.0, value]])
    assert odd_tensor(good | {"b": odd, "c": odd}) == "b"
