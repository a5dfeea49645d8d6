import pytest
import torch

from bdclean.functional.precision import cpu_has_bfloat16, full_float32


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"architecture": "other"}, True),
    ],
)
def test_instructions_go_by_the_name_of_the_format(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_has_bfloat16() is has


def test_an_older_torch_tells_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_has_bfloat16()


def flags():
    matmul = torch.get_float32_matmul_precision()
    return torch.backends.cudnn.allow_tf32, matmul, torch.is_autocast_enabled("cpu")


def test_full_float32_is_neither_tf32_nor_autocast_and_ends():
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            before = flags()
            with full_float32("cpu"):
                assert flags() == (False, "highest", False)
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert flags() == before == (True, "high", True)
            with pytest.raises(ZeroDivisionError), full_float32("cpu"):
                raise ZeroDivisionError
            assert flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")
