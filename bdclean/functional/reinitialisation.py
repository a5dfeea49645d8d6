"""Partial re-initialisation by depth, the start of backdoor cleansing (BCU).

An element of a weight keeps the suspect value with probability 1 - r and takes a fresh one with
probability r; r depends on the depth of its block.

Source: Pang, Sun, Ling, Chen, CVPR 2023, eq. 3, and the authors' code (luluppang/BCU), which
lists r for ResNet-18: stem 0.01, blocks 0.01 0.01 0.03 0.03 0.09 0.09 0.27 0.27, classifier
0.10. The rule r(d) = 0.01 * 27^d over the relative depth d in [0, 1] gives these numbers and
extends them to other networks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bdclean.errors import ConfigError, WeightsError

Strategy = Literal["increasing", "uniform", "decreasing", "single_stage", "none"]

STEM_RATIO = 0.01
HEAD_RATIO = 0.10
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
ATTENTION_INPUTS = (
    "in_proj_weight",
    "in_proj_bias",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
)


def element_mask(shape: Sequence[int], ratio: float, generator: torch.Generator) -> Tensor:
    """Draws which elements take the fresh value, each on its own with probability `ratio`.

    Args:
        shape: Shape of the tensor that is masked.
        ratio: r in [0, 1].
        generator: Source of the draw; the mask lies on its device.

    Returns:
        A boolean tensor of that shape; True: take the fresh value.

    Raises:
        ConfigError: The ratio is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(f"ratio is {ratio}; it must lie between 0 and 1")
    return torch.rand(tuple(shape), generator=generator, device=generator.device) < ratio


def maskable_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Lists the parameters that re-initialisation may change, by the type of their layer.

    These are weight and bias of convolutions and linear layers, and the input projections of
    `nn.MultiheadAttention`, which are linear layers stored in another place. Parameters and
    statistics of norm layers never belong to them.

    Yields:
        Name inside `module` and parameter, in the order of `named_modules`.
    """
    for prefix, layer in module.named_modules():
        names: tuple[str, ...] = ()
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            names = ("weight", "bias")
        elif isinstance(layer, nn.MultiheadAttention):
            names = ATTENTION_INPUTS
        for name in names:
            parameter = getattr(layer, name, None)
            if parameter is not None:
                yield f"{prefix}.{name}" if prefix else name, parameter


def maskable_count(module: nn.Module) -> int:
    """Returns the number of elements in the maskable tensors of `module`."""
    return sum(parameter.numel() for _, parameter in maskable_tensors(module))


@torch.no_grad()
def mix_weights_(
    student: nn.Module, fresh: nn.Module, ratio: float, generator: torch.Generator
) -> tuple[int, int]:
    """Replaces, in place, a random share of the student's maskable elements by fresh ones.

    W <- (1 - M) * W + M * W_fresh with M ~ Bernoulli(ratio) for every element; nothing is
    rescaled. All other parameters and all buffers stay as they are.

    Args:
        student: Holds the suspect weights; changed in place.
        fresh: A network of the same structure with new weights; not changed.
        ratio: r in [0, 1].
        generator: Source of the masks.

    Returns:
        The numbers of elements that took the fresh value and of all maskable elements.

    Raises:
        ConfigError: The ratio is not in [0, 1].
        WeightsError: The two networks differ in structure.
    """
    olds, news = dict(maskable_tensors(student)), dict(maskable_tensors(fresh))
    differing = [
        name
        for name in sorted(olds.keys() | news.keys())
        if name not in olds or name not in news or olds[name].shape != news[name].shape
    ]
    if differing:
        raise WeightsError(
            "the fresh network is not of the student's architecture; they differ in "
            f"{len(differing)} weights, the first of which is {differing[0]!r}"
        )
    redrawn = 0
    for name, old in olds.items():
        mask = element_mask(old.shape, ratio, generator)
        redrawn += int(mask.sum())
        old.copy_(torch.where(mask.to(old.device), news[name].to(old), old))
    return redrawn, sum(old.numel() for old in olds.values())


def depth_ratio(depth: float) -> float:
    """Returns r(d) = 0.01 * 27^d for the relative depth d, 0 for the first group, 1 for the last.

    Four groups (the layers of a ResNet) get 0.01, 0.03, 0.09, 0.27.
    """
    return 0.01 * math.pow(27, depth)


def overall_fraction(ratios: Sequence[float], sizes: Sequence[int]) -> float:
    """Returns the expected share of re-initialised elements: the mean of `ratios` by `sizes`."""
    return sum(r * n for r, n in zip(ratios, sizes, strict=True)) / sum(sizes)


def block_ratios(
    strategy: Strategy,
    groups: Sequence[int],
    sizes: Sequence[int],
    *,
    has_head: bool = True,
    gamma: float = 1.5,
    single_group: int = 0,
    strength: float = 1.0,
) -> list[float]:
    """Returns the share of elements to re-initialise for every block, from input to output.

    With s the rank of a block's group among the S groups between stem and head:

    - `increasing`: r = 0.01 * 27^(s / (S - 1)), stem 0.01, head 0.10. A single group counts as
      the last one.
    - `uniform`: one ratio everywhere, with the same overall fraction as `increasing`.
    - `decreasing`: r = min(1, a * gamma^(S - 1 - s)), the stem as s = 0, head 0.10, with a such
      that the overall fraction is again that of `increasing`.
    - `single_stage`: the ratio of `uniform` in the group `single_group` only.
    - `none`: 0 everywhere.

    Args:
        strategy: One of the above.
        groups: For every block the index of its group (blocks of one spatial resolution); the
            first block is the stem, and with `has_head` the last one is the head.
        sizes: For every block the number of maskable elements.
        has_head: Whether the last block is the classifier head.
        gamma: Growth per group towards the input for `decreasing`, at least 1.
        single_group: Rank of the group for `single_stage`, from 0 to S - 1.
        strength: Multiplies all ratios, which are then capped at 1; 0 or above.

    Returns:
        Ratios in [0, 1], one for every block.

    Raises:
        ConfigError: A value is out of its range, or the lists do not fit together.
    """
    ranks = _block_ranks(groups, sizes, has_head)
    count = max(ranks) + 1
    _check_settings(strategy, gamma, single_group, count, strength)

    def spread(stem: float, of_rank: Callable[[int], float], head: float) -> list[float]:
        return [stem, *map(of_rank, ranks), *[head] * has_head]

    ratios = spread(
        STEM_RATIO, lambda s: depth_ratio(s / (count - 1) if count > 1 else 1.0), HEAD_RATIO
    )
    fraction = overall_fraction(ratios, sizes)
    if strategy == "uniform":
        ratios = spread(fraction, lambda s: fraction, fraction)
    elif strategy == "single_stage":
        ratios = spread(0.0, lambda s: fraction if s == single_group else 0.0, 0.0)
    elif strategy == "none":
        ratios = spread(0.0, lambda s: 0.0, 0.0)
    elif strategy == "decreasing":

        def falling(a: float) -> list[float]:
            at = [min(1.0, a * gamma ** (count - 1 - s)) for s in range(count)]
            return spread(at[0], lambda s: at[s], HEAD_RATIO)

        ratios = falling(_bisect(lambda a: overall_fraction(falling(a), sizes), fraction))
    return [min(1.0, strength * ratio) for ratio in ratios]


def _block_ranks(groups: Sequence[int], sizes: Sequence[int], has_head: bool) -> list[int]:
    """Numbers the groups of the blocks between stem and head as 0, 1, ..., S - 1."""
    if len(groups) != len(sizes):
        raise ConfigError(f"{len(groups)} groups meet {len(sizes)} sizes; give one per block")
    blocks = list(groups[1 : len(groups) - has_head])
    if not blocks:
        raise ConfigError(
            f"{len(groups)} blocks are too few to re-initialise by depth; "
            "there must be a stem and at least one block that is neither stem nor head"
        )
    if any(later < earlier for earlier, later in pairwise(blocks)):
        raise ConfigError(f"groups are {blocks}; from input to output they must not fall")
    if min(sizes) < 0 or sum(sizes) == 0:
        raise ConfigError(f"sizes are {list(sizes)}; they must be counts with a positive sum")
    order = sorted(set(blocks))
    return [order.index(group) for group in blocks]


def _check_settings(
    strategy: str, gamma: float, single_group: int, count: int, strength: float
) -> None:
    if strategy not in get_args(Strategy):
        raise ConfigError(f"strategy is {strategy!r}; allowed: {get_args(Strategy)}")
    if gamma < 1:
        raise ConfigError(f"gamma is {gamma}; it must be at least 1")
    if strategy == "single_stage" and not 0 <= single_group < count:
        raise ConfigError(f"single_group is {single_group}; it must lie in 0 to {count - 1}")
    if strength < 0:
        raise ConfigError(f"strength is {strength}; it must be 0 or above")


def _bisect(rising: Callable[[float], float], wanted: float) -> float:
    """Solves rising(a) = wanted for a in [0, 1] to the precision of a float."""
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return high
