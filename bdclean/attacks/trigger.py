"""The trigger of an attack: a deterministic map of images in pixel space."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from bdclean.attacks.checks import Quantize, require, require_choice, require_size
from bdclean.errors import AttackError, in_words
from bdclean.weights import format as weights_format

_CHUNK_VALUES = 2**18  # 1 MB of float32 at a time, whatever the number and size of the images
_FLOOR_TOLERANCE = 1e-4  # in grey levels; float32 puts an exact 108 at 107.99999


class Trigger(nn.Module, ABC):
    """Maps images in [0, 1] to triggered images in [0, 1].

    A subclass gives its tensors to this constructor, which keeps them as buffers, and its other
    settings to `arguments()`. Its own constructor takes exactly these two sets by name (or it
    overrides `rebuild`), so that a saved trigger can be rebuilt without the attack, its seed, or
    a user's picture.

    Args:
        size: Height and width of the images, in pixels.
        quantize: How `poison` returns to 8 bits.
        **tensors: The buffers, by name.

    Raises:
        AttackError: The size is not two integers of at least 1, or `quantize` is unknown.
    """

    def __init__(
        self, size: Sequence[int], quantize: Quantize = "round", **tensors: Tensor
    ) -> None:
        super().__init__()
        require_choice("quantize", quantize, Quantize)
        self.size = require_size(size)
        self.quantize = quantize
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """The formula of the attack, before clipping to [0, 1].

        Args:
            images: Float images in [0, 1], (..., 3, H, W); must not be changed in place.
        """

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that are not buffers, ready for JSON."""
        return {"quantize": self.quantize}

    @classmethod
    def rebuild(cls, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> "Trigger":
        """Builds a trigger from its saved state; overridden where the state is nested.

        Args:
            tensors: The state dict.
            arguments: What `arguments()` gave.
        """
        return cls(**{**tensors, **arguments})

    def forward(self, images: Tensor) -> Tensor:
        """Returns triggered copies of the images.

        Args:
            images: Float images in [0, 1], (B, 3, H, W) or (3, H, W).

        Returns:
            A new tensor of the same shape and dtype, in [0, 1].

        Raises:
            AttackError: The images are not of floating type or not of the trigger's size.
        """
        self._check(images)
        if not images.is_floating_point():
            raise AttackError(f"the trigger takes float images in [0, 1], not {images.dtype}.")
        return self.stamp(images).clamp(0, 1)

    @final
    @torch.no_grad()
    def poison(self, images: Tensor) -> Tensor:
        """Returns triggered copies of stored images, the same at training and at test time.

        Args:
            images: uint8 images, (N, 3, H, W) or (3, H, W).

        Returns:
            A new uint8 tensor of the same shape.

        Raises:
            AttackError: The images are not uint8 or not of the trigger's size, or `quantize`
                is "none".
        """
        self._check(images)
        if images.dtype != torch.uint8:
            raise AttackError(f"stored images are uint8, not {images.dtype}.")
        self.require_levels()
        rows = images.unsqueeze(0) if images.dim() == 3 else images
        return self.change(rows, lambda floats, _: self.forward(floats)).view_as(images)

    @final
    def require_levels(self) -> None:
        """Refuses a trigger that does not go back to 8 bits.

        Raises:
            AttackError: If `quantize` is "none".
        """
        require(
            self.quantize != "none",
            "quantize",
            self.quantize,
            "round or floor where images are stored as uint8 (none: call the trigger on floats)",
        )

    @final
    @torch.no_grad()
    def change(self, images: Tensor, transform: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Applies `transform` to stored images, part by part, and goes back to 8 bits.

        Args:
            images: uint8 images, (N, 3, H, W).
            transform: Maps a part of the images, as floats in [0, 1], and the slice of the rows
                that they are, to new floats in [0, 1].

        Returns:
            A new uint8 tensor of the same shape.
        """
        changed = torch.empty_like(images)
        step = max(1, _CHUNK_VALUES // (3 * self.size[0] * self.size[1]))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            floats = transform(images[part].float().div_(255), part)
            changed[part] = self._levels(floats).to(torch.uint8)
        return changed

    @final
    @torch.no_grad()
    def as_stored(self, images: Tensor) -> Tensor:
        """What images in [0, 1] become when they are kept as 8 bits, as floats again."""
        return images if self.quantize == "none" else self._levels(images).div_(255)

    def _levels(self, images: Tensor) -> Tensor:
        levels = images * 255
        if self.quantize == "floor":
            return levels.add_(_FLOOR_TOLERANCE).floor_()
        return levels.round_()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of class, arguments and buffers: equal means bit-equal triggers."""
        digest = hashlib.sha256(json.dumps([_name(type(self)), self.arguments()]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes buffers, class, arguments and fingerprint to one `.safetensors` file."""
        metadata = {
            "trigger": _name(type(self)),
            "arguments": json.dumps(self.arguments()),
            "fingerprint": self.fingerprint,
        }
        weights_format.write(self.state_dict(), path, metadata)

    @staticmethod
    def load(path: str | Path) -> "Trigger":
        """Rebuilds a saved trigger, bit-equal.

        Only trigger classes that are already imported are considered: a file cannot name code
        to run.

        Raises:
            WeightsError: The file is missing or unreadable.
            AttackError: The file is not a saved trigger, or was changed.
        """
        tensors, metadata = weights_format.read(path)
        known = {_name(cls): cls for cls in _subclasses()}
        name = metadata.get("trigger", "")
        if name not in known:
            raise AttackError(
                f"{path}: unknown trigger class {name!r}; known are {', '.join(sorted(known))}."
            )
        try:
            trigger = known[name].rebuild(tensors, json.loads(metadata["arguments"]))
        except Exception as error:  # damaged settings can end anywhere in a class
            raise AttackError(f"{path}: not a saved {name}: {in_words(error)}.") from error
        if trigger.fingerprint != metadata.get("fingerprint"):
            raise AttackError(f"{path}: content and fingerprint differ; the file was changed.")
        return trigger

    def _check(self, images: Tensor) -> None:
        height, width = self.size
        if images.dim() not in (3, 4) or images.shape[-3:] != (3, height, width):
            raise AttackError(
                f"images have shape {tuple(images.shape)}; this trigger takes "
                f"(B, 3, {height}, {width}) or (3, {height}, {width})."
            )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclasses() -> list[type[Trigger]]:
    found: list[type[Trigger]] = []
    waiting = Trigger.__subclasses__()
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return found
