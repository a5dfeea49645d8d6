"""Wide ResNets for small images, such as WRN-16-1 and WRN-28-10.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. Names are those of the PyTorch
code that NAD and many others use (github.com/xternalz/WideResNet-pytorch). There is no dropout.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WideBlock(nn.Module):
    """Two 3x3 convolutions whose batch norms come first.

    Args:
        inputs: Channels that come in.
        channels: Channels of both convolutions.
        stride: Of the first one.
    """

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = inputs == channels
        # spelled as in the files
        self.convShortcut = None if same else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        beside = x if self.convShortcut is None else self.convShortcut(y)
        y = F.relu(self.bn2(self.conv1(y)))
        changed: Tensor = self.conv2(y)
        return beside + changed


class WideResNet(nn.Module):
    """A wide ResNet that ends after global average pooling.

    Args:
        depth: 6 n + 4.
        factor: How many times more channels the blocks have than the first layer.
        channels: Of the first layer, 16 for the published networks.
    """

    def __init__(self, depth: int, factor: int, channels: int = 16) -> None:
        super().__init__()
        count, wide = (depth - 4) // 6, factor * channels
        self.num_features = 4 * wide
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.block1 = _blocks(channels, wide, count, 1)
        self.block2 = _blocks(wide, 2 * wide, count, 2)
        self.block3 = _blocks(2 * wide, 4 * wide, count, 2)
        self.bn1 = nn.BatchNorm2d(4 * wide)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def layers(self) -> list[nn.Module]:
        """The three rows of blocks, in their order."""
        return [self.get_submodule(f"block{number}.layer") for number in (1, 2, 3)]

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to features (B, 4 * factor * channels)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return torch.flatten(self.avgpool(F.relu(self.bn1(x))), 1)


def _blocks(inputs: int, channels: int, count: int, stride: int) -> nn.Sequential:
    first = WideBlock(inputs, channels, stride)
    others = (WideBlock(channels, channels, 1) for _ in range(count - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others)))
