"""Which number format is fast on the processor at hand, and float32 that is float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is slower than float32.

    Of a CPU that PyTorch tells nothing of, it is taken for granted.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        return True
    # amx_bf16, avx512_bf16, bf16 of ARM
    told = [bool(has) for name, has in torch.cpu.get_capabilities().items() if "bf16" in name]
    return any(told) or not told


@contextmanager
def fast_format(device_type: str) -> Iterator[None]:
    """Autocast to bfloat16 where that is faster than float32.

    Args:
        device_type: Such as `cpu` or `cuda`.
    """
    with torch.autocast(device_type, torch.bfloat16, enabled=_has_bfloat16(device_type)):
        yield


def _has_bfloat16(device_type: str) -> bool:
    return torch.cuda.is_bf16_supported() if device_type == "cuda" else cpu_has_bfloat16()


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Without autocast and without TF32.

    GPUs from Ampere on convolve float32 in TF32 by default, with 10 bits of mantissa.

    Args:
        device_type: Such as `cpu` or `cuda`.
    """
    convolution, matmul = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32 = convolution
        torch.set_float32_matmul_precision(matmul)
