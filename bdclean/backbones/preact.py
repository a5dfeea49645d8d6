"""Pre-activation ResNets for small images: batch norm and ReLU before each convolution.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016. Parameter names are those of
the CIFAR networks that published victims use (github.com/kuangliu/pytorch-cifar, BackdoorBench);
as there, no batch norm follows the last block.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """Two convolutions, 3x3 each, whose batch norms come first.

    Args:
        inputs: Channels that come in.
        channels: Channels of both convolutions.
        stride: Of the first one.
    """

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        changed: Tensor = self.conv2(F.relu(self.bn2(y)))
        return beside + changed


class PreActBottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, whose batch norms come first.

    Args:
        inputs: Channels that come in.
        channels: Channels of the first two convolutions; the last one has four times as many.
        stride: Of the second one.
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, 4 * channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y)))
        changed: Tensor = self.conv3(F.relu(self.bn3(y)))
        return beside + changed


class PreActResNet(nn.Module):
    """A pre-activation ResNet that ends after global average pooling.

    Args:
        block: Kind of its blocks.
        blocks: Blocks in each of the four layers, for example (2, 2, 2, 2) for depth 18.
        width: Channels of the first layer, 64 for the published networks.
    """

    def __init__(
        self,
        block: type[PreActBlock] | type[PreActBottleneck],
        blocks: tuple[int, int, int, int],
        width: int = 64,
    ) -> None:
        super().__init__()
        expansion = block.expansion
        self.num_features = 8 * width * expansion
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        before = width
        for number, count in enumerate(blocks, start=1):
            channels = width * 2 ** (number - 1)
            first = block(before, channels, 1 if number == 1 else 2)
            before = channels * expansion
            others = (block(before, channels, 1) for _ in range(count - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *others))
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    @property
    def layers(self) -> list[nn.Module]:
        """The four layers, in their order."""
        return [self.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)]

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to features (B, D)."""
        x = self.conv1(x)
        for layer in self.layers:
            x = layer(x)
        return torch.flatten(self.avgpool(x), 1)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
