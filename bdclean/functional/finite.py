"""Numbers that are not finite, among tensors that have names."""

from collections.abc import Mapping

from torch import Tensor


def odd_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite; None without one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None
