"""A classifier in two parts, features and head, with the normalisation inside."""

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from bdclean.backbones.head import ProbeHead
from bdclean.errors import ConfigError, WeightsError
from bdclean.files import FORMAT_KEY
from bdclean.types import RGB

Stem = Literal["auto", "cifar", "imagenet"]
Head = Literal["linear", "probe"]

FORMAT_VERSION = "1"
_LONGEST = 500  # characters of a value in the metadata


@dataclass(frozen=True)
class ModelInfo:
    """Everything needed to build a model again; travels in the metadata of a weights file.

    Attributes:
        arch: A name that `bdclean.backbones.build` knows.
        num_classes: Outputs of the head; None is a backbone without a head.
        input_size: Height and width of the images, in pixels.
        mean: Per-channel mean of the normalisation, in units of [0, 1] pixels.
        std: Per-channel standard deviation of the normalisation, same units.
        width: Scale of the channels; 64 is the published network. In a ResNet-18 these are the
            channels of the first layer.
        stem: First layers of the network; "auto" is "cifar" up to 64 pixels.
        head: Kind of the head, if there is one: a linear layer, or that of a linear probe.

    Raises:
        ConfigError: If a value is out of its range.
    """

    arch: str
    num_classes: int | None
    input_size: int
    mean: RGB
    std: RGB
    width: int = 64
    stem: Stem = "auto"
    head: Head = "linear"

    def __post_init__(self) -> None:
        for key in ("num_classes", "input_size", "width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: it must be at least 1.")
        if self.stem not in ("auto", "cifar", "imagenet"):
            raise ConfigError(f"stem={self.stem!r}: it must be auto, cifar or imagenet.")
        if self.head not in ("linear", "probe"):
            raise ConfigError(f"head={self.head!r}: it must be linear or probe.")
        for key in ("mean", "std"):
            given = getattr(self, key)
            given = tuple(given) if isinstance(given, Iterable) else (given,)
            if not all(isinstance(value, Real) and not isinstance(value, bool) for value in given):
                raise ConfigError(f"{key}={given}: each value must be a number.")
            values = tuple(float(value) for value in given)
            if len(values) != 3:
                raise ConfigError(f"{key}={values}: it needs one number for each of R, G, B.")
            object.__setattr__(self, key, values)  # lists of a config file become tuples
            if not all(math.isfinite(value) for value in values):
                raise ConfigError(f"{key}={values}: each value must be finite.")
        if min(self.std) <= 0:
            raise ConfigError(f"std={self.std}: each value must be above 0.")

    def to_metadata(self) -> dict[str, str]:
        """JSON text for each field, and the version of this format."""
        values = {field.name: json.dumps(getattr(self, field.name)) for field in fields(self)}
        return {FORMAT_KEY: FORMAT_VERSION, **values}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Reads what `to_metadata` wrote; further keys are left alone.

        Raises:
            WeightsError: If the version is unknown or a value is missing or of a wrong type.
        """
        version = metadata.get(FORMAT_KEY)
        if version != FORMAT_VERSION:
            raise WeightsError(
                f"{FORMAT_KEY}={version!r:.50} in the metadata: this release reads "
                f"{FORMAT_VERSION!r}."
            )
        values: dict[str, Any] = {}
        for field in fields(cls):
            try:
                values[field.name] = json.loads(_short(metadata[field.name]))
            except (KeyError, ValueError, RecursionError) as error:
                raise WeightsError(
                    f"The metadata has no readable value for {field.name!r}."
                ) from error
        numbers = (values["input_size"], values["width"], values["num_classes"] or 1)
        if not isinstance(values["arch"], str) or any(
            type(number) is not int for number in numbers
        ):
            raise WeightsError(
                "The metadata does not describe a model: arch is text, and input_size, width and "
                "num_classes are whole numbers."
            )
        try:
            return cls(**values)
        except (TypeError, ValueError, OverflowError, ConfigError) as error:
            raise WeightsError(f"The metadata does not describe a model: {error}") from error


def _short(text: str) -> str:
    """Text of a file, which may hold any.

    Raises:
        ValueError: If it is longer than what `to_metadata` writes.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"{len(text)} characters")
    return text


class Normalize(nn.Module):
    """Maps pixels in [0, 1] to (pixels - mean) / std, per channel.

    Args:
        mean: Three means, in units of [0, 1] pixels.
        std: Three standard deviations, in the same units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, 3, H, W)."""
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


class SplitModel(nn.Module):
    """Normalisation, backbone and an optional head.

    The names in the state dict are `normalize.mean`, `normalize.std`, `backbone.*`,
    `head.weight` and `head.bias`; the head of a linear probe has `head.mean`, `head.std`,
    `head.linear.weight` and `head.linear.bias`.

    Args:
        backbone: Maps normalised images (B, 3, H, W) to features that flatten to (B, D).
        num_features: D.
        num_classes: Outputs of the head; None leaves the head out.
        mean: Mean of the normalisation, in units of [0, 1] pixels.
        std: Standard deviation of the normalisation, same units.
        info: How the model was built. Its classes, mean and std are replaced by the above.

    Attributes:
        head: The classifier, or None.
        head_is_drawn: Whether it has been put in place of another one, or of none, at random.
    """

    head: nn.Linear | ProbeHead | None
    head_is_drawn = False

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        num_classes: int | None,
        mean: RGB,
        std: RGB,
        info: ModelInfo,
    ) -> None:
        super().__init__()
        self.info = replace(info, num_classes=num_classes, mean=mean, std=std)
        self.num_features = num_features
        self.normalize = Normalize(mean, std)
        self.backbone = backbone
        self.head = None
        if num_classes is not None:
            kind = ProbeHead if self.info.head == "probe" else nn.Linear
            self.head = kind(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) in [0, 1] to features (B, D).

        Raises:
            ConfigError: If batch norm is to train on a single number, which has no variance.
        """
        try:
            return torch.flatten(self.backbone(self.normalize(x)), 1)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"A batch is one image on each device, on which batch norm cannot train where "
                f"{self.info.arch} makes one pixel of it; give more images, or larger batches."
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) in [0, 1] to logits (B, K).

        Raises:
            ConfigError: If the model has no head.
        """
        logits: Tensor = self.require_head()(self.features(x))
        return logits

    def require_head(self) -> nn.Linear | ProbeHead:
        """The head.

        Raises:
            ConfigError: If there is none.
        """
        if self.head is None:
            raise ConfigError(
                f"The model ({self.info.arch}) has no classifier head, so it gives features but no "
                "classes. Train a linear probe on it, or load weights that hold a head."
            )
        return self.head

    def replace_head(self, num_classes: int | None, kind: Head = "linear") -> None:
        """Puts a freshly drawn head in place, or none; `info` and `head_is_drawn` follow."""
        self.info = replace(self.info, num_classes=num_classes, head=kind)
        mean = self.normalize.mean
        self.head, self.head_is_drawn = None, num_classes is not None
        if num_classes is not None:
            make = ProbeHead if kind == "probe" else nn.Linear
            head = make(self.num_features, num_classes)
            self.head = head.to(device=mean.device, dtype=mean.dtype)

    def copy(self) -> "SplitModel":
        """A deep copy that shares no storage with this model."""
        return copy.deepcopy(self)
