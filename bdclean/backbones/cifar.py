"""The networks for small images that published victims use: their names, and what is known."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from bdclean.backbones.cifar_resnet import CifarResNet
from bdclean.backbones.cifar_vgg import DEPTHS, LEAST_SIDE, CifarVGG
from bdclean.backbones.preact import PreActBlock, PreActBottleneck, PreActResNet
from bdclean.backbones.wide_resnet import WideResNet
from bdclean.errors import ConfigError
from bdclean.types import RGB

PUBLISHED_WIDTH = 64
NAMES = (
    "preact_resnet18/34/50, resnet20/32/44/56, wrn16_1 (depth and factor, up to wrn40_12), "
    "vgg11_cifar (13, 16, 19)"
)
"""For messages."""

Network = PreActResNet | CifarResNet | WideResNet | CifarVGG
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Family:
    """A published network.

    Attributes:
        make: Makes it without its classifier, by the channels of its first layer.
        channels: Those of the published network, which `width` 64 stands for.
        last: Shape of the weights of its last blocks, there.
        count: How many weights have that shape.
        head: Name of the classifier in published files.
        colours: Mean and std of the images that its published files were trained with.
        least: Smallest side of the images, in pixels.
    """

    make: Callable[[int], Network]
    channels: int
    last: tuple[int, int, int, int]
    count: int
    head: str
    colours: tuple[RGB, RGB] = _CIFAR10
    least: int = 1

    @property
    def step(self) -> int:
        """The width of the network whose first layer has one channel."""
        return PUBLISHED_WIDTH // self.channels


def _preact(
    block: type[PreActBlock] | type[PreActBottleneck], *blocks: int
) -> Callable[[int], PreActResNet]:
    first, second, third, fourth = blocks
    return lambda channels: PreActResNet(block, (first, second, third, fourth), channels)


CIFAR: Mapping[str, Family] = {
    "preact_resnet18": Family(_preact(PreActBlock, 2, 2, 2, 2), 64, (512, 512, 3, 3), 3, "linear"),
    "preact_resnet34": Family(_preact(PreActBlock, 3, 4, 6, 3), 64, (512, 512, 3, 3), 5, "linear"),
    "preact_resnet50": Family(
        _preact(PreActBottleneck, 3, 4, 6, 3), 64, (2048, 512, 1, 1), 3, "linear"
    ),
    **{
        f"resnet{depth}": Family(
            partial(CifarResNet, depth),
            16,
            (64, 64, 3, 3),
            (depth - 2) // 3 - 1,
            "linear",
            _IMAGENET,
        )
        for depth in (20, 32, 44, 56)
    },
    **{
        f"wrn{depth}_{factor}": Family(
            partial(WideResNet, depth, factor),
            16,
            (64 * factor, 64 * factor, 3, 3),
            (depth - 4) // 3 - 1,
            "fc",
        )
        for depth in (10, 16, 22, 28, 34, 40)
        for factor in range(1, 13)
    },
    **{
        f"vgg{depth}_cifar": Family(
            partial(CifarVGG, depth),
            64,
            (512, 512, 3, 3),
            blocks[3] + blocks[4] - 1,
            "classifier",
            least=LEAST_SIDE,
        )
        for depth, blocks in DEPTHS.items()
    },
}
"""By name. `width` scales all channels; 64 is the published network."""


def check_cifar(arch: str, width: int, input_size: int, stem: str) -> None:
    """Checks that width, input size and stem fit one of these networks.

    Raises:
        ConfigError: If one of them does not.
    """
    family = CIFAR[arch]
    if stem == "imagenet":
        raise ConfigError(f"stem='imagenet': {arch} has its own; leave stem out.")
    if width % family.step:
        raise ConfigError(
            f"width={width}: {arch} has {family.channels} channels at width 64, so it must be a "
            f"multiple of {family.step}."
        )
    if input_size < family.least:
        raise ConfigError(
            f"arch={arch!r} does not take input_size={input_size}: it must be at least "
            f"{family.least}."
        )


def make_cifar(arch: str, width: int) -> Network:
    """Makes one of these networks without its classifier."""
    family = CIFAR[arch]
    return family.make(width // family.step)


def fitting_cifar(
    channels: int, shapes: Mapping[tuple[int, ...], int]
) -> Iterator[tuple[str, int]]:
    """Networks of so many channels at first, whose last blocks a file may hold, once or more often.

    Args:
        channels: Of a 3x3 convolution of three channels.
        shapes: How many weights of the file have each shape.

    Yields:
        Name and width.
    """
    for name, family in CIFAR.items():
        inputs, outputs, *sides = family.last
        scaled = [size * channels // family.channels for size in (inputs, outputs)]
        there = shapes.get((*scaled, *sides), 0)
        if there and there % family.count == 0:
            yield name, channels * family.step
