"""The thin ResNets for CIFAR: ResNet-20, 32, 44 and 56.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. Their shortcuts
have no parameters (option A). Names are those of github.com/akamaster/pytorch_resnet_cifar10.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PaddedShortcut(nn.Module):
    """Every second pixel, and zeros for the channels that are new: half before, half after.

    Args:
        new: How many channels are new.
    """

    def __init__(self, new: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C + new, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with batch norm.

    Args:
        inputs: Channels that come in.
        channels: Channels of both convolutions.
        stride: Of the first one.
    """

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        new = channels - inputs
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(new)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A thin ResNet that ends after global average pooling.

    Args:
        depth: Layers with weights, the classifier included: 6 n + 2.
        channels: Of the first layer, 16 for the published networks.
    """

    def __init__(self, depth: int, channels: int = 16) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.num_features = 4 * channels
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = _layer(channels, channels, count, 1)
        self.layer2 = _layer(channels, 2 * channels, count, 2)
        self.layer3 = _layer(2 * channels, 4 * channels, count, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to features (B, 4 * channels)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return torch.flatten(self.avgpool(self.layer3(self.layer2(self.layer1(x)))), 1)


def _layer(inputs: int, channels: int, count: int, stride: int) -> nn.Sequential:
    first = CifarBlock(inputs, channels, stride)
    return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(count - 1)))
