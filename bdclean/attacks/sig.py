"""SIG (Barni et al., ICIP 2019, arXiv:1902.11237): a horizontal sinusoid over the image.

v(j) = delta / 255 * sin(2 pi f j / W) over the columns j, the same in all rows and channels.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bdclean.attacks.base import Attack
from bdclean.attacks.checks import (
    LabelRule,
    Quantize,
    RateBase,
    is_between,
    require,
    require_choice,
    require_size,
)
from bdclean.attacks.trigger import Trigger

Variant = Literal["additive", "convex", "bench_v1", "mask_image"]


class SIGTrigger(Trigger):
    """Adds or mixes in a signal that depends on the column only.

    Args:
        signal: (1, 1, W); v in units of [0, 1], or the wrapped picture of "mask_image".
        variant: How the signal meets the image, see `SIG`.
        alpha: Mixing share in [0, 1]; None for "additive".
        quantize: How `poison` returns to 8 bits.
        height: H; None for a square image.
    """

    signal: Tensor

    def __init__(
        self,
        signal: Tensor,
        variant: Variant = "additive",
        alpha: float | None = None,
        quantize: Quantize = "round",
        height: int | None = None,
    ) -> None:
        width = signal.shape[-1]
        super().__init__((width if height is None else height, width), quantize, signal=signal)
        require_choice("variant", variant, Variant)
        self.variant = variant
        self.alpha = alpha
        # The share of the image and of the signal in x' = clip(a * x + b * v).
        share = 0.0 if alpha is None else alpha
        if variant == "additive":
            self.of_image, self.of_signal = 1.0, 1.0
        elif variant == "bench_v1":
            self.of_image, self.of_signal = share, 1 - share
        else:  # convex and mask_image differ in what the signal is
            self.of_image, self.of_signal = 1 - share, share

    def stamp(self, images: Tensor) -> Tensor:
        """The variant's formula; `forward` clips."""
        return self.of_image * images + self.of_signal * self.signal.to(images.dtype)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that are not buffers, ready for JSON."""
        own = {"variant": self.variant, "alpha": self.alpha}
        height, width = self.size
        return {**super().arguments(), **own, **({} if height == width else {"height": height})}


class SIG(Attack):
    """The SIG attack.

    Args:
        delta: Amplitude of v, in 8-bit pixel units, in (0, 255].
        frequency: f, cycles per image width, above 0.
        variant: "additive": x + v (Barni et al.); "convex": (1 - alpha) x + alpha v;
            "bench_v1": alpha x + (1 - alpha) v (an early BackdoorBench); "mask_image":
            (1 - alpha) x + alpha t, where t is v cast to uint8 with wrap-around (NAD's loader).
            All are clipped to [0, 1].
        alpha: In [0, 1], for every variant except "additive", which takes none.
        rate: Share of poisoned rows, in (0, 1].
        rate_base: What `rate` is a share of.
        label_rule: What happens to the labels of poisoned rows; the paper's is "clean_label".
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    def __init__(
        self,
        *,
        delta: float = 20.0,
        frequency: float = 6.0,
        variant: Variant = "additive",
        alpha: float | None = None,
        rate: float = 0.8,
        rate_base: RateBase = "target_class",
        label_rule: LabelRule = "clean_label",
        **kwargs: Any,
    ) -> None:
        super().__init__(rate=rate, rate_base=rate_base, label_rule=label_rule, **kwargs)
        require(is_between(delta, 0, 255) and delta > 0, "delta", delta, "in (0, 255]")
        finite = is_between(frequency, 0, math.inf) and frequency > 0
        require(finite, "frequency", frequency, "above 0")
        require_choice("variant", variant, Variant)
        if variant == "additive":
            require(alpha is None, "alpha", alpha, "left out with variant additive")
        else:
            fits = alpha is not None and is_between(alpha, 0, 1)
            require(fits, "alpha", alpha, f"in [0, 1] with variant {variant}")
        self.delta = delta
        self.frequency = frequency
        self.variant = variant
        self.alpha = alpha

    def make_trigger(self, size: tuple[int, int]) -> SIGTrigger:
        """Samples the signal on the columns of the images.

        Args:
            size: Height and width of the images in pixels.
        """
        height, width = require_size(size)
        columns = torch.arange(width, dtype=torch.float64)
        levels = self.delta * torch.sin(2 * math.pi * self.frequency * columns / width)
        if self.variant == "mask_image":
            levels = levels.trunc().long().remainder(256).double()  # -1 becomes 255
        signal = (levels / 255).float().reshape(1, 1, -1)
        return SIGTrigger(signal, self.variant, self.alpha, self.quantize, height)
