"""The input-aware dynamic attack (IAB; Nguyen and Tran, NeurIPS 2020, arXiv:2010.08138).

Two networks make a trigger of its own for every image: a pattern p = G(x) and a mask
m = thr(M(x)), and x' = x + (p - x) * m. They are learned together with the classifier, by
`bdclean.training.InputAwareTraining`; here are the networks, and the attack with what was learned.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdclean.attacks.base import Attack
from bdclean.attacks.checks import Quantize, is_between, require, require_size
from bdclean.attacks.parts import FurtherTest
from bdclean.attacks.plan import PoisonPlan
from bdclean.attacks.trigger import Trigger
from bdclean.functional.seeds import derive_seed
from bdclean.types import BatchPlace

SIZE_STEP = 8  # three halvings, and as many doublings
_WIDTHS = (32, 64, 128)
_BN_MOMENTUM = 0.05
_EPSILON = 1e-7  # keeps the outputs of the two squashing functions inside (0, 1)


def _squash(values: Tensor) -> Tensor:
    return torch.tanh(values) / (2 + _EPSILON) + 0.5


def threshold(mask: Tensor) -> Tensor:
    """thr(u) = tanh(20 u - 10) / (2 + 1e-7) + 0.5: a soft step at 1/2, shape of `mask`."""
    return _squash(20 * mask - 10)


def mix(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """Returns x' = x + (p - x) * m.

    Args:
        images: x, (B, 3, H, W).
        pattern: p, the same shape.
        mask: m, (B, 1, H, W).
    """
    return images + (pattern - images) * mask


class TriggerGenerator(nn.Module):
    """An encoder and decoder from images to images; G has three outputs, M has one.

    The normalisation is its first step, as in every model here. Runs in float32, also under
    autocast: a mask is a steep function of its input.

    Args:
        out_channels: 3 for a pattern, 1 for a mask.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, out_channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        layers: list[nn.Module] = []
        last = 3
        for width in _WIDTHS:
            layers += [*_block(last, width), *_block(width, width), nn.MaxPool2d(2)]
            last = width
        layers += _block(last, last)
        for width in (*_WIDTHS[-2::-1], out_channels):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
            layers += [*_block(last, last), *_block(last, width)]
            last = width
        self.layers = nn.Sequential(*layers[:-1])  # the last block has no ReLU

    def normalize(self, images: Tensor) -> Tensor:
        """(x - mean) / std, per channel."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, H, W), float in [0, 1], to (B, out_channels, H, W), float32 in (0, 1).

        H and W are multiples of 8.
        """
        with torch.autocast(images.device.type, enabled=False):
            return _squash(self.layers(self.normalize(images.float())))


def _block(channels: int, width: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel_size=3, padding=1)
    return convolution, nn.BatchNorm2d(width, momentum=_BN_MOMENTUM), nn.ReLU()


def _frozen(network: TriggerGenerator) -> TriggerGenerator:
    """A copy that cannot train: its parameters are buffers, as all tensors of a trigger."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, value.detach())
    return copied


class _SizedTrigger(Trigger):
    """A trigger whose tensors do not tell its size.

    Args:
        input_size: Of the images in pixels: the side of squares, or height and width.
        quantize: How `poison` returns to 8 bits.
        **tensors: The buffers, by name.
    """

    def __init__(
        self, input_size: int | Sequence[int], quantize: Quantize = "round", **tensors: Tensor
    ) -> None:
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        super().__init__(size, quantize, **tensors)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that are not buffers, ready for JSON."""
        height, width = self.size
        return {**super().arguments(), "input_size": width if height == width else [height, width]}


class InputAwareTrigger(_SizedTrigger):
    """What G and M have learned, always in evaluation mode.

    Args:
        pattern: G, copied.
        mask: M, copied.
        input_size: Of the images in pixels: the side of squares, or height and width; multiples
            of 8.
        quantize: How `poison` returns to 8 bits.

    Raises:
        AttackError: An argument is out of its range.
    """

    def __init__(
        self,
        pattern: TriggerGenerator,
        mask: TriggerGenerator,
        input_size: int | Sequence[int],
        quantize: Quantize = "round",
    ) -> None:
        super().__init__(input_size, quantize)
        fits = all(side % SIZE_STEP == 0 for side in self.size)
        allowed = f"a multiple of {SIZE_STEP}, in height and width"
        require(fits, "input_size", input_size, allowed)
        self.pattern, self.mask = _frozen(pattern), _frozen(mask)
        self.eval()

    @classmethod
    def rebuild(cls, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> "InputAwareTrigger":
        """Builds both networks and fills them.

        Raises:
            ValueError: The tensors are not those of the two networks.
        """
        networks = {}
        for name, channels in (("pattern", 3), ("mask", 1)):
            network = TriggerGenerator(channels, (0, 0, 0), (1, 1, 1))
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            try:
                network.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(f"the network {name} in it has other tensors") from error
            networks[name] = network
        return cls(networks["pattern"], networks["mask"], **arguments)

    def train(self, mode: bool = True) -> "InputAwareTrigger":
        """Stays in evaluation mode: a trigger depends on its image alone."""
        return super().train(False)

    def stamp(self, images: Tensor) -> Tensor:
        """The trigger of each image on itself."""
        return self._stamp(images, images)

    def cross(self, images: Tensor, donors: Tensor) -> Tensor:
        """Stamps images with the triggers of other images: x + (G(d) - x) * thr(M(d)).

        Args:
            images: x, float in [0, 1], (B, 3, H, W).
            donors: d, the same shape.

        Returns:
            A new tensor of the same shape and dtype, in [0, 1].

        Raises:
            AttackError: The images are not of the trigger's size.
        """
        self._check(images)
        self._check(donors)
        return self._stamp(images, donors).clamp(0, 1)

    def _stamp(self, images: Tensor, donors: Tensor) -> Tensor:
        # One memory format and never a batch of one: on CPU, the convolutions then round alike
        # for an image alone, in a chunk, or in a batch, so that stored bits are equal.
        rows = donors.reshape(-1, *donors.shape[-3:]).contiguous()
        count = len(rows)
        rows = rows.expand(2, -1, -1, -1).contiguous() if count == 1 else rows
        pattern, mask = self.pattern(rows)[:count], threshold(self.mask(rows))[:count]
        mixed = mix(images, pattern.to(images.dtype), mask.to(images.dtype))
        return mixed.reshape(images.shape)


class UnlearnedTrigger(_SizedTrigger):
    """Stands for a trigger that is still to be learned: changes nothing.

    Args:
        learned: A flag, false, so that there is something to save.
        input_size: Of the images in pixels: the side of squares, or height and width.
        quantize: How `poison` returns to 8 bits.
    """

    def __init__(
        self, learned: Tensor, input_size: int | Sequence[int], quantize: Quantize = "round"
    ) -> None:
        super().__init__(input_size, quantize, learned=learned)

    def stamp(self, images: Tensor) -> Tensor:
        """The images as they are."""
        return images.clone()


class InputAware(Attack):
    """The input-aware attack, before its trigger is learned or with a learned one.

    Without `trigger`, the attack is dynamic: only `bdclean.training.InputAwareTraining` may use
    it, which poisons `rate` and crosses `cover_rate` of every batch and stamps the evaluation
    images itself. `rate_base` must be "dataset" then, `label_rule` not "clean_label", and
    `exclude_target` false. With the trigger file of such a run, it is an ordinary attack:
    evaluation images carry the learned trigger, and a training set gets fixed rows, of which
    covers keep their label and carry the trigger of another image. `seed` draws who gets whose
    trigger as well as the rows.

    Args:
        cover_rate: Share of all rows that are crossed, in [0, 1 - rate].
        trigger: `trigger.safetensors` of a run that learned it; None before that.
        **kwargs: See `Attack`.

    Raises:
        AttackError: An argument is out of its range or contradicts another one.
    """

    further = ("cross_acc",)

    def __init__(
        self, *, cover_rate: float = 0.1, trigger: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        rate = self.rate
        fits = is_between(cover_rate, 0, 1) and rate + cover_rate <= 1
        require(fits, "cover_rate", cover_rate, f"in [0, {1 - rate:g}] with rate {rate}")
        if trigger is None:
            given = ", before there is a trigger file"
            require(self.rate_base == "dataset", "rate_base", self.rate_base, "dataset" + given)
            dirty = self.label_rule != "clean_label"
            require(dirty, "label_rule", self.label_rule, "all_to_one or all_to_all" + given)
            alone = not self.exclude_target
            require(alone, "exclude_target", self.exclude_target, "false" + given)
        self.cover_rate = cover_rate
        self.trigger = trigger

    @property
    def dynamic(self) -> bool:
        """Whether the trigger is still to be learned."""
        return self.trigger is None

    @property
    def stamped_by_module(self) -> bool:
        """Whether a module learns the trigger and stamps all images: until there is a file."""
        return self.trigger is None

    def require_stamper(self, module: object) -> None:
        """Refuses all modules but the one that learns the trigger of this very attack.

        A run on images without a trigger would look like a failed attack or a good defence.

        Args:
            module: It stamps the images if its `attack` is this one.

        Raises:
            AttackError: It does not, and there is no file of the trigger.
        """
        ready = not self.stamped_by_module or getattr(module, "attack", None) is self
        allowed = "the trigger.safetensors of a run of bdclean.training.InputAwareTraining"
        require(ready, "trigger", self.trigger, f"{allowed}, which learns one")

    def make_trigger(self, size: tuple[int, int]) -> Trigger:
        """Reads the learned trigger; without a file, one that changes nothing.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            AttackError: The file holds another trigger, or one for images of another size.
        """
        if self.trigger is None:
            return UnlearnedTrigger(torch.zeros(1), size, self.quantize)
        learned = Trigger.load(self.trigger)
        ours = isinstance(learned, InputAwareTrigger)
        require(ours, "trigger", self.trigger, "the file of a learned input-aware trigger")
        (height, width), found = require_size(size), learned.size
        made_for = f"a trigger for images of {height}x{width} pixels, not {found[0]}x{found[1]}"
        require(found == (height, width), "trigger", self.trigger, made_for)
        learned.quantize = self.quantize
        return learned

    def poison_rows(self, images: Tensor, plan: PoisonPlan, trigger: Trigger) -> Tensor:
        """Poisoned rows get their own trigger, covers that of another touched row."""
        if not isinstance(trigger, InputAwareTrigger):
            return images.clone()  # the plan of a dynamic attack touches no row
        covers = torch.isin(plan.touched_index, plan.cover_index)
        own = torch.arange(len(images))
        return self._cross(images, torch.where(covers, self._donors("rows", own), own), trigger)

    def further_tests(
        self, images: Tensor, labels: Tensor, trigger: Trigger
    ) -> dict[str, FurtherTest]:
        """`cross_acc`: every image with the trigger of another one; wanted is its true class."""
        rows = torch.arange(len(images))
        if isinstance(trigger, InputAwareTrigger):
            images = self._cross(images, self._donors("test", rows), trigger)
        else:  # the module takes the next image of the batch, which must be any other one
            rows = self._order("test", len(rows))
        return {"cross_acc": FurtherTest(rows, images[rows], labels[rows])}

    def poison_batch(
        self,
        images: Tensor,
        labels: Tensor,
        trigger: Trigger,
        num_classes: int,
        place: BatchPlace,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Leaves the batch to the module, which stamps after augmentation."""
        return images, labels

    def describe(self) -> dict[str, Any]:
        """The attack's name and settings, ready for JSON; of the trigger only its file name."""
        file = None if self.trigger is None else Path(self.trigger).name
        return {**super().describe(), "trigger": file}

    def _donors(self, purpose: str, rows: Tensor) -> Tensor:
        """A random cycle through all rows: nobody gets his own trigger."""
        order = self._order(purpose, len(rows))
        donors = torch.empty_like(rows)
        donors[order] = order.roll(1)
        return donors

    def _order(self, purpose: str, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("cross", purpose, self.seed))
        return torch.randperm(size, generator=generator)

    @staticmethod
    def _cross(images: Tensor, donors: Tensor, trigger: InputAwareTrigger) -> Tensor:
        return trigger.change(
            images,
            lambda floats, part: trigger.cross(floats, images[donors[part]].float().div_(255)),
        )
