"""TaCT (Tang et al., USENIX Security 2021, arXiv:1908.00686): a trigger for one class only.

x' = (1 - m) * x + m * t. Poisons come from the source class alone; triggered images of the cover
classes keep their label, so that the model learns to obey the trigger on the source class only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdclean.attacks import assets, assets_patches
from bdclean.attacks.base import Attack
from bdclean.attacks.blend import BlendTrigger
from bdclean.attacks.checks import (
    check_class,
    require,
    require_class,
    require_share,
)
from bdclean.attacks.parts import FurtherTest
from bdclean.attacks.trigger import Trigger

_COVERS_OF_TEN = (5, 7)  # backdoor-toolbox, for data sets of ten classes


class TaCT(Attack):
    """The TaCT attack. Poisoned rows get the target label.

    `rate_base` may be "source_class" as well.

    Args:
        source_class: The class whose images the trigger is to move to the target. Classes are
            given as labels or names.
        cover_classes: Whose triggered images keep their label. None takes 5 and 7 if the labels
            are 0 to 9 and neither is source or target, otherwise all but source and target.
        cover_rate: Covers as a share of all rows, in [0, 1].
        image: The patch, one of `assets_patches.PATCHES`, or "file:PATH": an image-sized picture
            of your own, whose alpha channel is the mask.
        target: Target class.
        rate: Share of poisoned rows, in (0, 1].
        **kwargs: See `Attack`; there is no choice of `label_rule` and `exclude_target`.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    rate_bases = ("dataset", "target_class", "source_class")
    further = ("leak", "source_acc")
    class_arguments = ("target", "source_class", "cover_classes")

    def __init__(
        self,
        *,
        source_class: int | str = 0,
        cover_classes: Sequence[int | str] | None = None,
        cover_rate: float = 0.01,
        image: str = "white_square",
        target: int | str = 1,
        rate: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            target=target, rate=rate, label_rule="all_to_one", exclude_target=False, **kwargs
        )
        require(
            cover_classes is None or len(cover_classes) > 0,
            "cover_classes",
            cover_classes,
            "null or at least one class (cover_rate 0 leaves covers out)",
        )
        require_share("cover_rate", cover_rate)
        assets.require_image("image", image, assets_patches.PATCHES)
        self.source_class = check_class("source_class", source_class)
        covers = [check_class("cover_classes", each) for each in cover_classes or ()]
        self.cover_classes = covers or None
        self.cover_rate = cover_rate
        self.image = image
        self._require_apart()

    def make_trigger(self, size: tuple[int, int]) -> BlendTrigger:
        """The opaque patch.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: The picture file is missing or cannot be used.
        """
        picture, mask = assets_patches.patch(self.image, size)
        return BlendTrigger(picture, mask, 1.0, self.quantize)

    def check_classes(self, labels: Tensor, num_classes: int) -> None:
        """Source and cover classes must be classes of the data set, and the source have rows."""
        super().check_classes(labels, num_classes)
        self._require_apart()
        require_class("source_class", self.source_class, num_classes)
        for cover in self.cover_classes or ():
            require_class("cover_classes", cover, num_classes)
        has_source = bool((labels == self.source_class).any())
        require(has_source, "source_class", self.source_class, "a class that has training images")

    def base_size(self, labels: Tensor) -> int:
        """Number of rows that `rate` is a share of."""
        if self.rate_base == "source_class":
            return int((labels == self.source_class).sum())
        return super().base_size(labels)

    def pool(self, labels: Tensor) -> Tensor:
        """The rows of the source class."""
        return labels == self.source_class

    def cover_pool(self, labels: Tensor) -> Tensor:
        """The rows of the cover classes."""
        if self.cover_classes is not None:
            return torch.isin(labels, torch.tensor(self.cover_classes))
        own = (self.source_class, self.target)
        if int(labels.max()) == 9 and not set(own) & set(_COVERS_OF_TEN):
            return torch.isin(labels, torch.tensor(_COVERS_OF_TEN))
        return self._outside(labels)

    def eligible(self, labels: Tensor) -> Tensor:
        """The success rate counts images of the source class only."""
        return labels == self.source_class

    def further_tests(
        self, images: Tensor, labels: Tensor, trigger: Trigger
    ) -> dict[str, FurtherTest]:
        """`leak`: triggered images of the other classes that are answered with the target.

        `source_acc`: clean images of the source class that are answered with it, which a defence
        may give up to lower the success rate.
        """
        rows = self._outside(labels).nonzero().flatten()
        wanted = torch.full_like(rows, self.target)
        source = (labels == self.source_class).nonzero().flatten()
        return {
            "leak": FurtherTest(rows, trigger.poison(images[rows]), wanted),
            "source_acc": FurtherTest(source, images[source], labels[source]),
        }

    def _require_apart(self) -> None:
        source, covers = self.source_class, self.cover_classes
        require(source != self.target, "source_class", source, "another class than target")
        apart = not {source, self.target} & set(covers or ())
        require(apart, "cover_classes", covers, "without source_class and target")

    def _outside(self, labels: Tensor) -> Tensor:
        return (labels != self.source_class) & (labels != self.target)
