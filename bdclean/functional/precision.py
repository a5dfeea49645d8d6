"""Which number format is fast on the processor at hand."""

import torch


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is slower than float32.

    Of a CPU that PyTorch tells nothing of, it is taken for granted.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        return True
    # amx_bf16, avx512_bf16, bf16 of ARM
    told = [bool(has) for name, has in torch.cpu.get_capabilities().items() if "bf16" in name]
    return any(told) or not told
