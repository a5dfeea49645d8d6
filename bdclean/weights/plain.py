"""Weights that a file holds as factors, multiplied out: pruning, weight norm, spectral norm."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _pruned(weight: Tensor, mask: Tensor) -> Tensor | None:
    return weight * mask.to(weight.dtype) if weight.shape == mask.shape else None


def _weight_norm(length: Tensor, direction: Tensor) -> Tensor | None:
    """Of the formula weight = length * direction / norm(direction), for each output."""
    if not direction.is_floating_point() or direction.ndim < 2:
        return None
    if length.shape != (len(direction), *[1] * (direction.ndim - 1)):
        return None
    norms = direction.flatten(1).norm(dim=1).view(length.shape)
    product: Tensor = direction * (length / norms)
    return product


def _spectral_norm(weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """The weight over its largest singular value, as the two stored vectors give it."""
    if weight.ndim < 2 or weight[:1].numel() != right.numel() or len(weight) != left.numel():
        return None
    left, right = left.flatten().to(weight.dtype), right.flatten().to(weight.dtype)
    return weight / torch.dot(left, weight.flatten(1) @ right)


# How the names of the factors end, and what makes the weight of them.
_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[..., Tensor | None]], ...] = (
    (("_orig", "_mask"), _pruned),
    (("_g", "_v"), _weight_norm),
    (("_orig", "_u", "_v"), _spectral_norm),
    ((".original0", ".original1"), _weight_norm),
    ((".original", ".0._u", ".0._v"), _spectral_norm),
)
_NEWER = "parametrizations."  # stands before the last part of a name


def multiplied_out(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces factors by the weight that they stand for.

    Takes what `torch.nn.utils` writes: `prune` (`weight_orig`, `weight_mask`), `weight_norm`
    (`weight_g`, `weight_v`) and `spectral_norm` (`weight_orig`, `weight_u`, `weight_v`), by their
    older and newer names. Factors whose shapes do not fit together are left as they are, and so are
    those of a file that would make more of its tensors than it has.

    Args:
        found: State dict of a file.

    Returns:
        The state dict, with the products at its end.
    """
    state = dict(found)
    left = bytes_of(found)
    for endings, multiply in _LAYOUTS:
        for name in [name for name in state if name.endswith(endings[0])]:
            stem = name.removesuffix(endings[0])
            factors = [state[stem + end] for end in endings if stem + end in state]
            whole = len(factors) == len(endings) and factors[0].is_floating_point()
            largest = max((factor.nbytes for factor in factors), default=0)
            product = multiply(*factors) if whole and largest <= left else None
            if product is not None:
                left -= largest
                for end in endings:
                    del state[stem + end]
                parent, _, last = stem.rpartition(_NEWER)
                state[parent + last] = product
    return state


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the memory that tensors show; what several of them show counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
